//! New models.

use super::def::{NodeDef, TensorDef, ValueDef, encode_entry};
use super::node::standard_domain;
use super::proto::{graph, model, opset};
use super::wire::Encoder;
use super::{Model, Result, check};

/// Collects the parts of a new model. Nodes come in topological order. The bytes are those that the reference
/// implementation writes for the same content.
#[derive(Clone, Debug)]
pub struct ModelBuilder {
    ir_version: i64,
    producer: (String, String),
    graph_name: String,
    opsets: Vec<(String, i64)>,
    nodes: Vec<NodeDef>,
    initializers: Vec<TensorDef>,
    inputs: Vec<ValueDef>,
    outputs: Vec<ValueDef>,
    value_info: Vec<ValueDef>,
    metadata: Vec<(String, String)>,
}

impl ModelBuilder {
    /// An empty model of this format version.
    pub fn new(graph_name: impl Into<String>, ir_version: i64) -> Self {
        Self {
            ir_version,
            producer: (String::new(), String::new()),
            graph_name: graph_name.into(),
            opsets: Vec::new(),
            nodes: Vec::new(),
            initializers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            value_info: Vec::new(),
            metadata: Vec::new(),
        }
    }

    /// Names the tool that makes the model.
    pub fn producer(&mut self, name: &str, version: &str) -> &mut Self {
        self.producer = (name.to_owned(), version.to_owned());
        self
    }

    /// Imports an operator set; the empty domain is `ai.onnx`.
    pub fn opset(&mut self, domain: &str, version: i64) -> &mut Self {
        self.opsets.push((standard_domain(domain).to_owned(), version));
        self
    }

    /// Adds a node after those that are there.
    pub fn node(&mut self, node: NodeDef) -> &mut Self {
        self.nodes.push(node);
        self
    }

    /// Adds a constant.
    pub fn initializer(&mut self, tensor: TensorDef) -> &mut Self {
        self.initializers.push(tensor);
        self
    }

    /// Adds an input.
    pub fn input(&mut self, value: ValueDef) -> &mut Self {
        self.inputs.push(value);
        self
    }

    /// Adds an output.
    pub fn output(&mut self, value: ValueDef) -> &mut Self {
        self.outputs.push(value);
        self
    }

    /// Declares the type of a value in between.
    pub fn value_info(&mut self, value: ValueDef) -> &mut Self {
        self.value_info.push(value);
        self
    }

    /// Adds a metadata entry.
    pub fn metadata(&mut self, key: &str, value: &str) -> &mut Self {
        self.metadata.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The model, checked.
    ///
    /// # Errors
    /// When a tensor's data does not fit its shape, or the structure does not hold; see [`check()`](super::check()).
    pub fn build(&self) -> Result<Model> {
        let mut encoder = Encoder::default();
        encoder.int(model::IR_VERSION, self.ir_version);
        encoder.optional_string(model::PRODUCER_NAME, &self.producer.0);
        encoder.optional_string(model::PRODUCER_VERSION, &self.producer.1);
        encoder.message(model::GRAPH, &self.encode_graph()?);
        for (domain, version) in &self.opsets {
            encoder.message(model::OPSET_IMPORT, &encode_opset(domain, *version));
        }
        for (key, value) in &self.metadata {
            encoder.message(model::METADATA_PROPS, &encode_entry(key, value));
        }
        let model = Model::from_bytes(encoder.into_bytes())?;
        check(&model)?;
        Ok(model)
    }

    fn encode_graph(&self) -> Result<Encoder> {
        let mut encoder = Encoder::default();
        for node in &self.nodes {
            encoder.message(graph::NODE, &node.encode()?);
        }
        encoder.string(graph::NAME, &self.graph_name);
        for tensor in &self.initializers {
            encoder.message(graph::INITIALIZER, &tensor.encode()?);
        }
        self.inputs.iter().for_each(|value| encoder.message(graph::INPUT, &value.encode()));
        self.outputs.iter().for_each(|value| encoder.message(graph::OUTPUT, &value.encode()));
        self.value_info.iter().for_each(|value| encoder.message(graph::VALUE_INFO, &value.encode()));
        Ok(encoder)
    }
}

/// An `OperatorSetIdProto`.
pub(crate) fn encode_opset(domain: &str, version: i64) -> Encoder {
    let mut encoder = Encoder::default();
    encoder.string(opset::DOMAIN, domain);
    encoder.int(opset::VERSION, version);
    encoder
}
