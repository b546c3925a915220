//! Structural checks: what must hold whatever the operators mean.

use std::collections::{HashMap, HashSet};
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
    check_in(model, Order::Topological)
}

/// Checks what [`check`] does, but lets the nodes stand in any order in which there is no cycle: the specification does not
/// allow it, some exporters do it all the same, and runtimes sort for themselves.
///
/// # Errors
/// The first thing that does not hold, with node and tensor.
pub fn check_any_order(model: &Model) -> Result<()> {
    check_in(model, Order::Any)
}

/// How the nodes of a graph may stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Topological,
    Any,
}

fn check_in(model: &Model, order: Order) -> Result<()> {
    check_old_initializers(model)?;
    check_graph(model, model.graph(), None, order)
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
    order: Order,
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

    /// A branch may make a tensor that the graph around it makes later (often the output of the branching node itself); in any
    /// order, later cannot be told from earlier.
    fn define(&mut self, name: &'a str, definition: Definition<'a>) -> Result<()> {
        let first = match self.order {
            Order::Topological => self.find(name),
            Order::Any => self.names.get(name).copied(),
        };
        if let Some(first) = first {
            let (first, second) = (first.to_string(), definition.to_string());
            return Err(Error::Duplicate { tensor: name.to_owned(), first, second });
        }
        self.names.insert(name, definition);
        Ok(())
    }
}

fn check_graph(model: &Model, graph: &Graph, outer: Option<&Scope<'_>>, order: Order) -> Result<()> {
    let mut scope = Scope { names: HashMap::with_capacity(graph.nodes().len()), outer, order };
    for input in graph.inputs() {
        scope.define(input.name(), Definition::Input)?;
    }
    define_initializers(graph, &mut scope)?;
    if order == Order::Any {
        graph.nodes().iter().try_for_each(|node| define_outputs(node, &mut scope))?;
        if let Some(cycle) = find_cycle(graph) {
            return Err(cycle);
        }
    }
    for node in graph.nodes() {
        check_node(model, graph, node, &scope)?;
        if order == Order::Topological {
            define_outputs(node, &mut scope)?;
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

fn define_outputs<'a>(node: &'a Node, scope: &mut Scope<'a>) -> Result<()> {
    let mut outputs = node.outputs().iter().filter(|name| !name.is_empty());
    outputs.try_for_each(|output| scope.define(output, Definition::Output(node)))
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
        check_graph(model, subgraph, Some(scope), scope.order).map_err(|error| match error {
            // What a branch misses may be made by this graph, only later.
            Error::Undefined { tensor, .. } if Index::new(graph).producer(&tensor).is_some() => {
                undefined(graph, node, &tensor)
            }
            error => error,
        })?;
    }
    Ok(())
}

/// Why `node` cannot read `tensor`: nothing makes it, or a later node does, be it only late or in a cycle.
fn undefined(graph: &Graph, node: &Node, tensor: &str) -> Error {
    let (label, name) = (node.label(), tensor.to_owned());
    let Some(producer) = Index::new(graph).producer(tensor) else {
        return Error::Undefined { node: label, tensor: name };
    };
    let late = || Error::UseBeforeDefinition { node: label, tensor: name, producer: producer.label() };
    find_cycle(graph).unwrap_or_else(late)
}

/// The first cycle of a graph, as an error.
fn find_cycle(graph: &Graph) -> Option<Error> {
    let index = Index::new(graph);
    // Kahn's algorithm: nodes leave once all that they read has left.
    let mut waits: HashMap<NodeId, usize> = HashMap::with_capacity(graph.nodes().len());
    let mut readers: HashMap<NodeId, Vec<NodeId>> = HashMap::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        let producers = producers(&index, node);
        waits.insert(node.id(), producers.len());
        for producer in producers {
            readers.entry(producer).or_default().push(node.id());
        }
    }
    let mut ready: Vec<NodeId> = waits.iter().filter(|(_, waits)| **waits == 0).map(|(&id, _)| id).collect();
    while let Some(id) = ready.pop() {
        waits.remove(&id);
        for reader in readers.get(&id).into_iter().flatten() {
            if let Some(count) = waits.get_mut(reader) {
                *count -= 1;
                if *count == 0 {
                    ready.push(*reader);
                }
            }
        }
    }
    // Each node that is left reads one that is left, so walking back meets itself.
    let mut path = vec![*waits.keys().min()?];
    let mut met = HashMap::new();
    loop {
        let last = *path.last()?;
        met.insert(last, path.len() - 1);
        let back = producers(&index, graph.node(last)?).into_iter().find(|id| waits.contains_key(id))?;
        path.push(back);
        if let Some(&start) = met.get(&back) {
            let nodes = path.get(start..)?.iter().rev().filter_map(|&id| graph.node(id)).map(Node::label).collect();
            return Some(Error::Cycle { nodes });
        }
    }
}

/// The nodes that make what a node or a graph nested in it reads, each once, in reading order.
fn producers(index: &Index<'_>, node: &Node) -> Vec<NodeId> {
    let mut seen = HashSet::new();
    let read = node.inputs().iter().map(String::as_str).chain(captures(node));
    read.filter_map(|tensor| Some(index.producer(tensor)?.id())).filter(|id| seen.insert(*id)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity_branch, if_node, raw_model};
    use super::super::{ModelBuilder, NodeDef, TensorDef, ValueDef};
    use super::*;
    use crate::onnx::DataType;

    fn neg(name: &str, from: &str, to: &str) -> NodeDef {
        NodeDef::new("Neg", name).inputs([from]).outputs([to])
    }

    fn value(name: &str) -> ValueDef {
        ValueDef::new(name, DataType::Float, [2.into()])
    }

    fn build(nodes: &[NodeDef]) -> Result<Model> {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(value("x")).output(value("y"));
        nodes.iter().for_each(|node| _ = builder.node(node.clone()));
        builder.build()
    }

    fn message(result: Result<Model>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn every_fault_names_node_and_tensor() {
        build(&[neg("a", "x", "h"), neg("b", "h", "y")]).unwrap();
        assert_eq!(
            message(build(&[neg("b", "h", "y"), neg("a", "x", "h")])),
            "node `b` (Neg) reads `h` before node `a` (Neg) makes it"
        );
        assert_eq!(
            message(build(&[neg("a", "z", "y")])),
            "node `a` (Neg) reads `z`, which is no input, no initializer and no node's output"
        );
        assert_eq!(
            message(build(&[neg("a", "x", "y"), neg("", "x", "y")])),
            "tensor `y` is defined twice: as an output of node `a` (Neg) and as an output of node number 1 (Neg)"
        );
        assert_eq!(message(build(&[neg("a", "x", "h")])), "graph `g` gives out `y`, which nothing makes");
        assert_eq!(
            message(build(&[neg("a", "x", "y").domain("com.microsoft")])),
            "node `a` (Neg) is of the operator set `com.microsoft`, which the model does not import"
        );
    }

    #[test]
    fn a_cycle_is_told_from_a_wrong_order() {
        let cycle = "the graph has a cycle: node `a` (Neg) → node `b` (Neg) → node `c` (Neg) → node `a` (Neg)";
        let nodes = [neg("d", "r", "y"), neg("a", "r", "p"), neg("b", "p", "q"), neg("c", "q", "r")];
        assert_eq!(message(build(&nodes[1..])), cycle);
        assert_eq!(
            message(build(&nodes)),
            "the graph has a cycle: node `c` (Neg) → node `a` (Neg) → node `b` (Neg) → node `c` (Neg)"
        );
        assert_eq!(message(build(&[neg("a", "y", "y")])), "the graph has a cycle: node `a` (Neg) → node `a` (Neg)");
    }

    #[test]
    fn any_order_is_any_but_a_cycle() {
        let model = |nodes: &[NodeDef]| {
            let encoded: Vec<_> = nodes.iter().map(|node| node.encode().unwrap()).collect();
            Model::from_bytes(raw_model(&encoded, &["x"], &["y"])).unwrap()
        };
        let swapped = model(&[neg("b", "h", "y"), neg("a", "x", "h")]);
        assert!(matches!(check(&swapped), Err(Error::UseBeforeDefinition { .. })));
        check_any_order(&swapped).unwrap();
        assert!(matches!(check_any_order(&model(&[neg("a", "h", "y"), neg("b", "y", "h")])), Err(Error::Cycle { .. })));
        assert!(matches!(check_any_order(&model(&[neg("a", "h", "y")])), Err(Error::Undefined { .. })));
        assert!(matches!(
            check_any_order(&model(&[neg("a", "x", "y"), neg("b", "x", "y")])),
            Err(Error::Duplicate { .. })
        ));
    }

    #[test]
    fn an_input_may_have_a_default_and_before_version_4_must() {
        let mut builder = ModelBuilder::new("g", 3);
        builder.opset("", 9).input(value("x")).output(value("y")).node(neg("a", "x", "y"));
        builder.initializer(TensorDef::from_f32s("x", &[2], &[0.0; 2])).build().unwrap();
        builder.initializer(TensorDef::from_f32s("w", &[2], &[0.0; 2]));
        assert!(matches!(builder.build(), Err(Error::InitializerNotInput { ir_version: 3, .. })));
    }

    /// A branch sees the names around it that are made before its node, and may not make one of them again.
    #[test]
    fn branches_see_what_is_made_before_them() {
        let model = |branch_input: &str, branch_output: &str, last: bool| {
            let branch = identity_branch(branch_input, branch_output);
            let (producer, reader) = (neg("a", "x", "h").encode().unwrap(), if_node(&branch, "x", "y"));
            let nodes = if last { vec![producer, reader] } else { vec![reader, producer] };
            check(&Model::from_bytes(raw_model(&nodes, &["x"], &["y"])).unwrap())
        };
        model("h", "inner", true).unwrap();
        assert!(matches!(model("h", "inner", false), Err(Error::UseBeforeDefinition { tensor, .. }) if tensor == "h"));
        assert!(matches!(model("z", "inner", true), Err(Error::Undefined { tensor, .. }) if tensor == "z"));
        assert!(matches!(model("h", "x", true), Err(Error::Duplicate { tensor, .. }) if tensor == "x"));
    }
}
