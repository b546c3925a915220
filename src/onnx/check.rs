//! Structural checks: what must hold whatever the operators mean.

use std::collections::HashMap;
use std::fmt;

use super::index::{Index, captures};
use super::{Error, Graph, Model, Node, NodeId, Result, TensorInfo};

/// The first format version whose initializers need not be graph inputs.
const FREE_INITIALIZERS: i64 = 4;

/// Checks the structure of a model's graph and the graphs nested in it: every tensor has one definition, in its graph or
/// around it, and is read after it is made; every output is made; every node's operator set is imported.
///
/// # Errors
/// The first thing that does not hold, with node and tensor.
pub fn check(model: &Model) -> Result<()> {
    check_old_initializers(model)?;
    check_graph(model, model.graph(), None)
}

fn check_old_initializers(model: &Model) -> Result<()> {
    let ir_version = model.ir_version();
    if ir_version >= FREE_INITIALIZERS {
        return Ok(());
    }
    let index = Index::new(model.graph());
    match model.graph().initializers().iter().find(|tensor| index.input(tensor.name()).is_none()) {
        Some(tensor) => Err(Error::InitializerNotInput { tensor: tensor.name().to_owned(), ir_version }),
        None => Ok(()),
    }
}

/// How a tensor came to be.
#[derive(Clone, Copy)]
enum Definition<'a> {
    Input,
    Initializer,
    Output(&'a Node),
}

impl fmt::Display for Definition<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input => f.write_str("an input"),
            Self::Initializer => f.write_str("an initializer"),
            Self::Output(node) => write!(f, "an output of {}", node.label()),
        }
    }
}

/// The names defined so far in a graph, and those around it.
struct Scope<'a> {
    names: HashMap<&'a str, Definition<'a>>,
    outer: Option<&'a Scope<'a>>,
}

impl<'a> Scope<'a> {
    fn find(&self, name: &str) -> Option<Definition<'a>> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some(found) = here.names.get(name) {
                return Some(*found);
            }
            scope = here.outer;
        }
        None
    }

    fn define(&mut self, name: &'a str, definition: Definition<'a>) -> Result<()> {
        if let Some(first) = self.find(name) {
            let (first, second) = (first.to_string(), definition.to_string());
            return Err(Error::Duplicate { tensor: name.to_owned(), first, second });
        }
        self.names.insert(name, definition);
        Ok(())
    }
}

fn check_graph(model: &Model, graph: &Graph, outer: Option<&Scope<'_>>) -> Result<()> {
    let mut scope = Scope { names: HashMap::with_capacity(graph.nodes().len()), outer };
    for input in graph.inputs() {
        scope.define(input.name(), Definition::Input)?;
    }
    define_initializers(graph, &mut scope)?;
    for node in graph.nodes() {
        check_node(model, graph, node, &scope)?;
        for output in node.outputs().iter().filter(|name| !name.is_empty()) {
            scope.define(output, Definition::Output(node))?;
        }
    }
    match graph.outputs().iter().find(|output| scope.find(output.name()).is_none()) {
        Some(output) => {
            let (graph, tensor) = (graph.name().to_owned(), output.name().to_owned());
            Err(Error::OutputUndefined { graph, tensor })
        }
        None => Ok(()),
    }
}

/// An initializer of an input's name is that input's default.
fn define_initializers<'a>(graph: &'a Graph, scope: &mut Scope<'a>) -> Result<()> {
    let sparse = graph.sparse_initializers().iter().map(|sparse| &sparse.values);
    for name in graph.initializers().iter().chain(sparse).map(TensorInfo::name) {
        if let Some(definition @ Definition::Input) = scope.names.get_mut(name) {
            *definition = Definition::Initializer;
            continue;
        }
        scope.define(name, Definition::Initializer)?;
    }
    Ok(())
}

fn check_node(model: &Model, graph: &Graph, node: &Node, scope: &Scope<'_>) -> Result<()> {
    if model.opset(node.domain()).is_none() {
        let domain = if node.domain().is_empty() { "ai.onnx" } else { node.domain() };
        return Err(Error::NoOpset { node: node.label(), domain: domain.to_owned() });
    }
    let inputs = node.inputs().iter().filter(|name| !name.is_empty());
    if let Some(tensor) = { inputs }.find(|name| scope.find(name).is_none()) {
        return Err(undefined(graph, node, tensor));
    }
    for subgraph in node.subgraphs() {
        check_graph(model, subgraph, Some(scope)).map_err(|error| match error {
            // What a branch misses may be made by this graph, only later.
            Error::Undefined { tensor, .. } if Index::new(graph).producer(&tensor).is_some() => {
                undefined(graph, node, &tensor)
            }
            error => error,
        })?;
    }
    Ok(())
}

/// Why `node` cannot read `tensor`: nothing makes it, a later node does, or one that itself waits for `node`.
fn undefined(graph: &Graph, node: &Node, tensor: &str) -> Error {
    let index = Index::new(graph);
    let (node_label, tensor) = (node.label(), tensor.to_owned());
    let Some(producer) = index.producer(&tensor) else {
        return Error::Undefined { node: node_label, tensor };
    };
    match find_path(&index, node.id(), producer.id()) {
        Some(path) => {
            let back = std::iter::once(producer.id());
            let nodes = back.chain(path).filter_map(|id| graph.node(id)).map(Node::label).collect();
            Error::Cycle { nodes }
        }
        None => Error::UseBeforeDefinition { node: node_label, tensor, producer: producer.label() },
    }
}

/// A way from one node to another along what each reads, both ends included, in data-flow order.
fn find_path(index: &Index<'_>, from: NodeId, to: NodeId) -> Option<Vec<NodeId>> {
    // Walked backwards from `to`: `next` says where a node's output is needed.
    let mut next: HashMap<NodeId, Option<NodeId>> = HashMap::from([(to, None)]);
    let mut open = vec![to];
    while let Some(id) = open.pop() {
        if id == from {
            let mut path = vec![id];
            let mut at = id;
            while let Some(Some(following)) = next.get(&at) {
                path.push(*following);
                at = *following;
            }
            return Some(path);
        }
        let Some(node) = index.graph().node(id) else { continue };
        for tensor in node.inputs().iter().map(String::as_str).chain(captures(node)) {
            let Some(producer) = index.producer(tensor) else { continue };
            if let std::collections::hash_map::Entry::Vacant(entry) = next.entry(producer.id()) {
                entry.insert(Some(id));
                open.push(producer.id());
            }
        }
    }
    None
}
