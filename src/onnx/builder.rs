//! New models.

use super::def::{FunctionDef, NodeDef, TensorDef, ValueDef, encode_entry, encode_opset};
use super::node::standard_domain;
use super::proto::{graph, model};
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
    functions: Vec<FunctionDef>,
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
            functions: Vec::new(),
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

    /// Adds a model-local function: what an operator means where a runtime does not know it.
    pub fn function(&mut self, function: FunctionDef) -> &mut Self {
        self.functions.push(function);
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
        for function in &self.functions {
            encoder.message(model::FUNCTIONS, &function.encode()?);
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

#[cfg(test)]
mod tests {
    use super::super::tests::{reference_check, small_model};
    use super::super::{DataType, Error};
    use super::*;

    /// The reference implementation accepts the model with shape inference, and would write the same bytes.
    #[test]
    fn the_reference_implementation_accepts_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        small_model().save(&path).unwrap();
        reference_check(&path);
    }

    #[test]
    fn what_was_built_is_what_is_read() {
        let model = small_model();
        assert_eq!((model.ir_version(), model.opset("ai.onnx"), model.opset("com.microsoft")), (8, Some(17), None));
        assert_eq!(model.producer(), ("prefold", "test"));
        assert_eq!(model.metadata("task"), Some("demo"));
        let graph = model.graph();
        let names: Vec<_> = graph.nodes().iter().map(|node| node.name()).collect();
        assert_eq!(names, ["project", "split", "shape", "pick", "join"]);
        let split = &graph.nodes()[1];
        assert_eq!((split.attribute("axis").unwrap().as_int(), split.output(1)), (Some(-1), Some("right")));
        assert_eq!(graph.initializers()[0].to_f32s().unwrap(), [1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 0.5, 0.0]);
        assert_eq!(graph.nodes()[2].attribute("value").unwrap().as_tensor().unwrap().to_i64s().unwrap(), [0, -1]);
    }

    #[test]
    fn a_tensor_of_the_wrong_size_is_refused() {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).initializer(TensorDef::from_f32s("w", &[3], &[1.0]));
        let found = builder.build();
        assert!(matches!(found, Err(Error::TensorSize { found: 4, expected: Some(12), .. })), "{found:?}");
        let constant = NodeDef::new("Constant", "c")
            .outputs(["c"])
            .attr_tensor("value", TensorDef::inline("", DataType::Int64, &[1], Vec::new()));
        let found = ModelBuilder::new("g", 8).opset("", 17).node(constant).build();
        assert!(matches!(found, Err(Error::TensorSize { found: 0, expected: Some(8), .. })), "{found:?}");
    }
}
