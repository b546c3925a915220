//! Nodes of a graph.

use super::proto::node;
use super::wire::Fields;
use super::{Attribute, Bytes, Graph, Result};

/// The number of a node in its model: those of the main graph come first, in their order, and then those of each nested
/// graph in turn. A model has every number once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) usize);

impl NodeId {
    /// The number, counted from zero.
    pub fn index(self) -> usize {
        self.0
    }
}

/// One operation of a graph.
#[derive(Clone, Debug)]
pub struct Node {
    id: NodeId,
    name: String,
    op_type: String,
    domain: String,
    overload: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    attributes: Vec<Attribute>,
}

impl Node {
    /// `depth` is how many graphs are around the node.
    pub(crate) fn parse(id: NodeId, body: &Bytes, depth: usize) -> Result<Self> {
        let empty = String::new;
        let (inputs, outputs, attributes) = (Vec::new(), Vec::new(), Vec::new());
        let (name, op_type, domain, overload) = (empty(), empty(), empty(), empty());
        let mut parsed = Self { id, name, op_type, domain, overload, inputs, outputs, attributes };
        for field in Fields::new(node::MESSAGE, body) {
            let field = field?;
            match field.number {
                node::INPUT => parsed.inputs.push(field.string()?),
                node::OUTPUT => parsed.outputs.push(field.string()?),
                node::NAME => parsed.name = field.string()?,
                node::OP_TYPE => parsed.op_type = field.string()?,
                node::DOMAIN => parsed.domain = field.string()?,
                node::OVERLOAD => parsed.overload = field.string()?,
                node::ATTRIBUTE => parsed.attributes.push(Attribute::parse(field.bytes()?, depth)?),
                _ => {}
            }
        }
        Ok(parsed)
    }

    /// The node's number in its model.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The node's name; may be empty, and some exporters use one name twice.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The operator: `MatMul`, `Softmax`, ….
    pub fn op_type(&self) -> &str {
        &self.op_type
    }

    /// The operator's domain; empty for the standard operators, whose other name `ai.onnx` is read as empty.
    pub fn domain(&self) -> &str {
        standard_domain(&self.domain)
    }

    /// The overload of a local function that is meant; mostly empty.
    pub fn overload(&self) -> &str {
        &self.overload
    }

    /// Whether the node is this operator of this domain (empty for the standard ones).
    pub fn is(&self, domain: &str, op_type: &str) -> bool {
        self.op_type == op_type && self.domain() == standard_domain(domain)
    }

    /// Names of the tensors read; an empty name is an optional input left out.
    pub fn inputs(&self) -> &[String] {
        &self.inputs
    }

    /// Names of the tensors made; an empty name is an optional output left out.
    pub fn outputs(&self) -> &[String] {
        &self.outputs
    }

    /// The input in a slot, unless it is left out.
    pub fn input(&self, slot: usize) -> Option<&str> {
        self.inputs.get(slot).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// The output in a slot, unless it is left out.
    pub fn output(&self, slot: usize) -> Option<&str> {
        self.outputs.get(slot).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// All attributes, in file order.
    pub fn attributes(&self) -> &[Attribute] {
        &self.attributes
    }

    /// Gives the node its number.
    pub(crate) fn renumber(&mut self, id: NodeId) {
        self.id = id;
    }

    /// The graphs nested in the node, to be numbered.
    pub(crate) fn subgraphs_mut(&mut self) -> impl Iterator<Item = &mut Graph> {
        self.attributes.iter_mut().flat_map(Attribute::graphs_mut)
    }

    /// The attribute of this name.
    pub fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attributes.iter().find(|attribute| attribute.name() == name)
    }

    /// The graphs nested in the node: branches and loop bodies.
    pub fn subgraphs(&self) -> impl Iterator<Item = &Graph> {
        self.attributes.iter().flat_map(Attribute::graphs)
    }

    /// How an error names the node.
    pub(crate) fn label(&self) -> String {
        if self.name.is_empty() {
            return format!("node number {} ({})", self.id.0, self.op_type);
        }
        format!("node `{}` ({})", self.name, self.op_type)
    }
}

/// The empty name for either name of the standard operators' domain.
pub(crate) fn standard_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}
