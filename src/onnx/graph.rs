//! A graph: nodes in topological order, and the values around them.

use std::ops::Range;

use super::proto::graph;
use super::wire::{Field, Fields};
use super::{Bytes, Error, Node, NodeId, Result, SparseTensor, TensorInfo, ValueInfo};

/// How deep graphs may be nested in each other. Three messages make one level, and protobuf itself ends at 100.
pub const MAX_GRAPH_DEPTH: usize = 32;

/// The graph of a model, or a branch or loop body nested in one. [`Display`](std::fmt::Display) lists it as text.
#[derive(Clone, Debug)]
pub struct Graph {
    fields: Vec<Field>,
    /// Numbers of its nodes, and of those nested in them.
    own: Range<usize>,
    all: Range<usize>,
    name: String,
    nodes: Vec<Node>,
    initializers: Vec<TensorInfo>,
    sparse_initializers: Vec<SparseTensor>,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    value_info: Vec<ValueInfo>,
}

impl Graph {
    /// `depth` is how many graphs are around this one.
    pub(crate) fn parse(body: &Bytes, depth: usize) -> Result<Self> {
        if depth >= MAX_GRAPH_DEPTH {
            return Err(Error::TooDeep { offset: body.offset(), limit: MAX_GRAPH_DEPTH });
        }
        Self::from_fields(Fields::new(graph::MESSAGE, body).collect::<Result<_>>()?, depth)
    }

    pub(crate) fn from_fields(fields: Vec<Field>, depth: usize) -> Result<Self> {
        let mut name = String::new();
        let (mut nodes, mut initializers, mut sparse_initializers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut inputs, mut outputs, mut value_info) = (Vec::new(), Vec::new(), Vec::new());
        for field in &fields {
            match field.number {
                graph::NAME => name = field.string()?,
                graph::NODE => nodes.push(Node::parse(NodeId(nodes.len()), field.bytes()?, depth + 1)?),
                graph::INITIALIZER => initializers.push(TensorInfo::parse(field.bytes()?)?),
                graph::SPARSE_INITIALIZER => sparse_initializers.push(SparseTensor::parse(field.bytes()?)?),
                graph::INPUT => inputs.push(ValueInfo::parse(field.bytes()?)?),
                graph::OUTPUT => outputs.push(ValueInfo::parse(field.bytes()?)?),
                graph::VALUE_INFO => value_info.push(ValueInfo::parse(field.bytes()?)?),
                _ => {}
            }
        }
        let own = 0..nodes.len();
        let mut graph = Self {
            fields,
            own: own.clone(),
            all: own,
            name,
            nodes,
            initializers,
            sparse_initializers,
            inputs,
            outputs,
            value_info,
        };
        if depth == 0 {
            graph.number(0);
        }
        Ok(graph)
    }

    /// Numbers the nodes from `first` on, and those of the graphs nested in them after all of its own; returns the number
    /// that follows.
    fn number(&mut self, first: usize) -> usize {
        let mut next = first;
        for node in &mut self.nodes {
            node.renumber(NodeId(next));
            next += 1;
        }
        self.own = first..next;
        for graph in self.nodes.iter_mut().flat_map(Node::subgraphs_mut) {
            next = graph.number(next);
        }
        self.all = first..next;
        next
    }

    /// The numbers of its nodes and of all that are nested in them.
    pub(crate) fn numbers(&self) -> Range<usize> {
        self.all.clone()
    }

    /// The message's fields as they were.
    pub(crate) fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The nodes, in topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of a number; none where it is not of this graph, but of one around it or nested in it.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index().checked_sub(self.own.start)?)
    }

    /// The constants; one that is an input too is that input's default.
    pub fn initializers(&self) -> &[TensorInfo] {
        &self.initializers
    }

    /// The sparse constants.
    pub fn sparse_initializers(&self) -> &[SparseTensor] {
        &self.sparse_initializers
    }

    /// The inputs.
    pub fn inputs(&self) -> &[ValueInfo] {
        &self.inputs
    }

    /// The outputs.
    pub fn outputs(&self) -> &[ValueInfo] {
        &self.outputs
    }

    /// Declared types of values in between.
    pub fn value_info(&self) -> &[ValueInfo] {
        &self.value_info
    }

    /// Calls `visit` with this graph and every graph nested in it.
    pub(crate) fn visit<'a>(&'a self, visit: &mut impl FnMut(&'a Self)) {
        visit(self);
        for subgraph in self.nodes.iter().flat_map(Node::subgraphs) {
            subgraph.visit(visit);
        }
    }
}
