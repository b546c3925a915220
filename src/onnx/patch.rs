//! Edits as values.

use std::collections::{BTreeMap, HashSet};

use super::def::{NodeDef, TensorDef, ValueDef, encode_entry, encode_opset};
use super::given_out::GivenOut;
use super::node::standard_domain;
use super::proto::{attribute, entry, graph, model, node, tensor};
use super::tensor::parse_entry;
use super::wire::{Encoder, Field, Fields};
use super::{Attribute, Error, Graph, Model, Node, NodeId, Result, check, check_any_order, check_types};

/// An edit of a model: collected first, checked and applied as a whole afterwards.
///
/// Nodes are put, and inputs replaced, in whatever graph the named node is of, main or nested; constants, inputs and outputs
/// are the main graph's, whose names every nested graph sees. Node numbers are those of the model as it is before the edit. What the edit does not name keeps its bytes and its
/// place.
#[derive(Clone, Debug, Default)]
pub struct Patch {
    label: String,
    before: BTreeMap<usize, Vec<NodeDef>>,
    appended: Vec<NodeDef>,
    initializers: Vec<TensorDef>,
    replaced_initializers: Vec<TensorDef>,
    inputs: Vec<ValueDef>,
    outputs: Vec<ValueDef>,
    given_out: Vec<GivenOut>,
    replaced: Vec<(usize, usize, String)>,
    opsets: Vec<(String, i64)>,
    metadata: Vec<(String, String)>,
}

impl Patch {
    /// An empty edit; errors name its label.
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    /// Puts a new node right before a node; several keep the order in which they were given.
    pub fn insert_before(&mut self, id: NodeId, node: NodeDef) -> &mut Self {
        self.before.entry(id.index()).or_default().push(node);
        self
    }

    /// Puts a new node at the end.
    pub fn append_node(&mut self, node: NodeDef) -> &mut Self {
        self.appended.push(node);
        self
    }

    /// Adds a constant. One of an input's name is that input's default.
    pub fn add_initializer(&mut self, tensor: TensorDef) -> &mut Self {
        self.initializers.push(tensor);
        self
    }

    /// Puts a constant in the place of the one of its name.
    pub fn replace_initializer(&mut self, tensor: TensorDef) -> &mut Self {
        self.replaced_initializers.push(tensor);
        self
    }

    /// Gives what the edit adds other names, wherever the edit says them; names of the model stay. `rename` gives none to
    /// keep a name.
    pub fn rename(&mut self, rename: impl Fn(&str) -> Option<String>) -> &mut Self {
        let nodes = self.before.values().flatten().chain(&self.appended);
        let nodes = nodes.flat_map(|node| node.outputs_made().iter().map(String::as_str).chain([node.name()]));
        let constants = self.initializers.iter().map(TensorDef::name);
        let own = nodes.chain(constants).chain(self.inputs.iter().map(ValueDef::name));
        let names: BTreeMap<String, String> = own.filter_map(|name| Some((name.to_owned(), rename(name)?))).collect();
        let renamed = |name: &mut String| {
            if let Some(new) = names.get(name.as_str()) {
                name.clone_from(new);
            }
        };
        self.before.values_mut().flatten().chain(&mut self.appended).for_each(|node| node.each_name(renamed));
        self.initializers.iter_mut().for_each(|tensor| renamed(tensor.name_mut()));
        self.inputs.iter_mut().chain(&mut self.outputs).for_each(|value| renamed(value.name_mut()));
        self.replaced.iter_mut().for_each(|(_, _, tensor)| renamed(tensor));
        self
    }

    /// Adds a graph input after those that are there.
    pub fn add_input(&mut self, value: ValueDef) -> &mut Self {
        self.inputs.push(value);
        self
    }

    /// Adds a graph output after those that are there.
    pub fn add_output(&mut self, value: ValueDef) -> &mut Self {
        self.outputs.push(value);
        self
    }

    /// Adds a tensor of the graph that a node is in as an output of the model, and returns the name that it has there: a branch
    /// of an `If` gives it to the node, and a run that takes another branch gives an empty tensor of as many dimensions.
    ///
    /// # Errors
    /// When `model` has no such node, or the graph is nested in something else.
    pub fn give_out(&mut self, model: &Model, inside: NodeId, value: ValueDef) -> Result<String> {
        let (main, name) = (model.graph(), value.name().to_owned());
        let Some(given) = GivenOut::new(model, inside, value.clone())? else {
            let there = main.outputs().iter().any(|output| output.name() == name);
            if !there && self.outputs.iter().all(|output| output.name() != name) {
                self.outputs.push(value);
            }
            return Ok(name);
        };
        let name = given.output(main).name().to_owned();
        if self.given_out.iter().all(|other| other.output(main).name() != name) {
            self.given_out.push(given);
        }
        Ok(name)
    }

    /// Lets an input slot of a node read another tensor.
    pub fn replace_input(&mut self, id: NodeId, slot: usize, tensor: impl Into<String>) -> &mut Self {
        self.replaced.push((id.index(), slot, tensor.into()));
        self
    }

    /// Wants an operator set of at least this version: it is imported where it is missing; an older one is an error.
    pub fn require_opset(&mut self, domain: &str, version: i64) -> &mut Self {
        self.opsets.push((standard_domain(domain).to_owned(), version));
        self
    }

    /// Sets a metadata entry of the model.
    pub fn set_metadata(&mut self, key: &str, value: &str) -> &mut Self {
        self.metadata.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The edited model; the one given stays as it is.
    ///
    /// # Errors
    /// When a node or slot does not exist, a name is taken, an operator set is too old, or the result does not pass
    /// [`check()`](super::check()) or [`check_types`]. A fault that the model had before is not blamed on the edit; that its nodes do not stand
    /// in topological order is tolerated, as runtimes do.
    pub fn apply(self, model: &Model) -> Result<Model> {
        let label = self.label.clone();
        self.edit(model).and_then(|patched| check_edited(model, &patched).map(|()| patched)).map_err(|source| {
            check_any_order(model).err().unwrap_or_else(|| Error::Patch { label, source: Box::new(source) })
        })
    }

    fn edit(&self, model: &Model) -> Result<Model> {
        self.check_node_names(model.graph())?;
        let mut fields = model.fields().to_vec();
        self.import_opsets(model, &mut fields)?;
        for (key, value) in &self.metadata {
            set_metadata(&mut fields, key, value)?;
        }
        let graph = if self.edits_graph() { Some(self.edit_graph(model.graph())?) } else { None };
        model.rebuilt(fields, graph)
    }

    fn edits_graph(&self) -> bool {
        let nodes = self.before.is_empty() && self.appended.is_empty() && self.replaced.is_empty();
        let constants = self.initializers.is_empty() && self.replaced_initializers.is_empty();
        let outputs = self.outputs.is_empty() && self.given_out.is_empty();
        !(nodes && constants && self.inputs.is_empty() && outputs)
    }

    fn check_node_names(&self, graph: &Graph) -> Result<()> {
        let mut names = HashSet::new();
        graph.visit(&mut |graph| names.extend(graph.nodes().iter().map(Node::name)));
        let new = self.before.values().flatten().chain(&self.appended).map(NodeDef::name);
        match { new }.find(|name| !name.is_empty() && !names.insert(name)) {
            Some(name) => Err(Error::DuplicateNode { node: name.to_owned() }),
            None => Ok(()),
        }
    }

    fn import_opsets(&self, model: &Model, fields: &mut Vec<Field>) -> Result<()> {
        let mut imports: BTreeMap<&str, i64> = BTreeMap::new();
        for (domain, needed) in &self.opsets {
            match model.opset(domain) {
                Some(found) if found < *needed => {
                    let domain = if domain.is_empty() { "ai.onnx" } else { domain };
                    return Err(Error::OldOpset { domain: domain.to_owned(), found, needed: *needed });
                }
                Some(_) => {}
                None => {
                    let version = imports.entry(domain).or_insert(*needed);
                    *version = (*needed).max(*version);
                }
            }
        }
        let encoded = imports.into_iter().map(|(domain, version)| Ok(encode_opset(domain, version)));
        insert(fields, model::MESSAGE, model::OPSET_IMPORT, encoded)
    }

    fn edit_graph(&self, graph: &Graph) -> Result<Graph> {
        let has = |name: &str| graph.initializers().iter().any(|tensor| tensor.name() == name);
        if let Some(tensor) = self.replaced_initializers.iter().find(|tensor| !has(tensor.name())) {
            return Err(Error::NoInitializer { tensor: tensor.name().to_owned() });
        }
        let replaced = self.replacements()?;
        let mut edits = Edits { before: &self.before, given_out: &self.given_out, replaced };
        let (named, nodes) = (edits.before.keys().chain(edits.replaced.keys()), graph.numbers().len());
        if let Some(&index) = { named }.find(|&&index| index >= nodes) {
            return Err(Error::NoNode { index, nodes });
        }
        let mut fields = edits.fields(graph)?;
        self.replace_constants(&mut fields)?;
        let message = graph::MESSAGE;
        insert(&mut fields, message, graph::NODE, self.appended.iter().map(NodeDef::encode))?;
        insert(&mut fields, message, graph::INITIALIZER, self.initializers.iter().map(TensorDef::encode))?;
        insert(&mut fields, message, graph::INPUT, self.inputs.iter().map(|value| Ok(value.encode())))?;
        let given_out: Vec<ValueDef> = self.given_out.iter().map(|given| given.output(graph)).collect();
        let outputs = self.outputs.iter().chain(&given_out);
        insert(&mut fields, message, graph::OUTPUT, outputs.map(|value| Ok(value.encode())))?;
        Graph::from_fields(fields, 0)
    }

    /// Puts the new constants in the place of those of their names.
    fn replace_constants(&self, fields: &mut [Field]) -> Result<()> {
        if self.replaced_initializers.is_empty() {
            return Ok(());
        }
        for field in fields.iter_mut().filter(|field| field.number == graph::INITIALIZER) {
            let name = initializer_name(field)?;
            let new = self.replaced_initializers.iter().find(|tensor| name.as_deref() == Some(tensor.name()));
            if let Some(new) = new {
                *field = wrap(graph::MESSAGE, graph::INITIALIZER, &new.encode()?)?;
            }
        }
        Ok(())
    }

    /// New input names by node and slot.
    fn replacements(&self) -> Result<BTreeMap<usize, BTreeMap<usize, &str>>> {
        let mut replaced: BTreeMap<usize, BTreeMap<usize, &str>> = BTreeMap::new();
        for (index, slot, name) in &self.replaced {
            if let Some(first) = replaced.entry(*index).or_default().insert(*slot, name) {
                let (first, second) = (first.to_owned(), name.clone());
                return Err(Error::ReplacedTwice { index: *index, slot: *slot, first, second });
            }
        }
        Ok(replaced)
    }
}

/// The name of an initializer, read only where the edit replaces some.
fn initializer_name(field: &Field) -> Result<Option<String>> {
    for part in Fields::new(tensor::MESSAGE, field.bytes()?) {
        let part = part?;
        if part.number == tensor::NAME {
            return part.string().map(Some);
        }
    }
    Ok(None)
}

/// New nodes by the node that they stand before, and new input names by node and slot.
struct Edits<'a> {
    before: &'a BTreeMap<usize, Vec<NodeDef>>,
    given_out: &'a [GivenOut],
    replaced: BTreeMap<usize, BTreeMap<usize, &'a str>>,
}

impl Edits<'_> {
    /// The fields of a graph with these edits of its nodes and of those nested in them.
    fn fields(&mut self, graph: &Graph) -> Result<Vec<Field>> {
        let mut fields = Vec::with_capacity(graph.fields().len());
        let mut nodes = graph.nodes().iter();
        for field in graph.fields() {
            let Some(existing) = nodes.as_slice().first().filter(|_| field.number == graph::NODE) else {
                fields.push(field.clone());
                continue;
            };
            let index = existing.id().index();
            for new in self.before.get(&index).into_iter().flatten() {
                fields.push(wrap(graph::MESSAGE, graph::NODE, &new.encode()?)?);
            }
            fields.push(self.node(field, existing)?);
            nodes.next();
        }
        Ok(fields)
    }

    fn touches(&self, graph: &Graph) -> bool {
        let numbers = graph.numbers();
        self.before.range(numbers.clone()).next().is_some() || self.replaced.range(numbers).next().is_some()
    }

    /// A node's field: the bytes that it was, unless some of its inputs or of its nested graphs are edited.
    fn node(&mut self, field: &Field, existing: &Node) -> Result<Field> {
        let slots = self.replaced.remove(&existing.id().index()).unwrap_or_default();
        let given_out: Vec<&GivenOut> = self.given_out.iter().filter(|given| given.passes(existing)).collect();
        let edited = |edits: &Self, graph: &Graph| !given_out.is_empty() || edits.touches(graph);
        let nested = existing.subgraphs().any(|graph| edited(self, graph));
        if slots.is_empty() && !nested {
            return Ok(field.clone());
        }
        let inputs = existing.inputs().len();
        if let Some(&slot) = slots.keys().find(|&&slot| slot >= inputs) {
            return Err(Error::NoSlot { node: existing.label(), slot, inputs });
        }
        let mut encoder = Encoder::default();
        let (mut slot, mut attributes) = (0, existing.attributes().iter());
        for part in Fields::new(node::MESSAGE, field.bytes()?) {
            let part = part?;
            match part.number {
                node::INPUT => {
                    match slots.get(&slot) {
                        Some(name) => encoder.string(node::INPUT, name),
                        None => encoder.raw(&part),
                    }
                    slot += 1;
                }
                node::ATTRIBUTE => match attributes.next() {
                    Some(attribute) if attribute.graphs().iter().any(|graph| edited(self, graph)) => {
                        encoder.message(node::ATTRIBUTE, &self.attribute(&part, (existing, attribute), &given_out)?);
                    }
                    _ => encoder.raw(&part),
                },
                _ => encoder.raw(&part),
            }
        }
        given_out.iter().for_each(|given| encoder.string(node::OUTPUT, &given.name(existing)));
        wrap(graph::MESSAGE, graph::NODE, &encoder)
    }

    /// An attribute of a node, whose graphs are edited. Of several fields for one graph, the last one counts.
    fn attribute(
        &mut self,
        field: &Field,
        (node, existing): (&Node, &Attribute),
        given_out: &[&GivenOut],
    ) -> Result<Encoder> {
        let parts = Fields::new(attribute::MESSAGE, field.bytes()?).collect::<Result<Vec<_>>>()?;
        let holds_graph = |part: &Field| matches!(part.number, attribute::G | attribute::GRAPHS);
        let count = parts.iter().filter(|part| holds_graph(part)).count();
        let mut skipped = count.saturating_sub(existing.graphs().len());
        let mut graphs = existing.graphs().iter();
        let mut encoder = Encoder::default();
        for part in &parts {
            let next = if holds_graph(part) && skipped == 0 { graphs.next() } else { None };
            skipped = skipped.saturating_sub(usize::from(holds_graph(part)));
            match next.filter(|graph| !given_out.is_empty() || self.touches(graph)) {
                Some(graph) => {
                    let mut content = Encoder::default();
                    let mut fields = self.fields(graph)?;
                    for given in given_out {
                        let (value, maker) = given.of_branch(node, graph);
                        let message = graph::MESSAGE;
                        insert(&mut fields, message, graph::NODE, maker.iter().map(NodeDef::encode))?;
                        insert(&mut fields, message, graph::OUTPUT, std::iter::once(Ok(value.encode())))?;
                    }
                    fields.iter().for_each(|field| content.raw(field));
                    encoder.message(part.number, &content);
                }
                None => encoder.raw(part),
            }
        }
        Ok(encoder)
    }
}

fn check_edited(before: &Model, after: &Model) -> Result<()> {
    match check(after) {
        Err(Error::UseBeforeDefinition { .. }) if check(before).is_err() => check_any_order(after)?,
        result => result?,
    }
    match check_types(after) {
        Err(conflict) if check_types(before).is_ok() => Err(conflict),
        _ => Ok(()),
    }
}

/// A field that holds a message.
fn wrap(message: &'static str, number: u32, content: &Encoder) -> Result<Field> {
    let mut encoder = Encoder::default();
    encoder.message(number, content);
    Field::of(message, encoder)
}

/// Adds fields after the last one of their number, or where the order of numbers wants them.
fn insert(
    fields: &mut Vec<Field>,
    message: &'static str,
    number: u32,
    contents: impl Iterator<Item = Result<Encoder>>,
) -> Result<()> {
    let new = contents.map(|content| wrap(message, number, &content?)).collect::<Result<Vec<_>>>()?;
    let last = fields.iter().rposition(|field| field.number == number);
    let greater = || fields.iter().position(|field| field.number > number);
    let at = last.map(|last| last + 1).or_else(greater).unwrap_or(fields.len());
    fields.splice(at..at, new);
    Ok(())
}

/// Sets a metadata entry: the value of an existing one is replaced, and the rest of it stays.
fn set_metadata(fields: &mut Vec<Field>, key: &str, value: &str) -> Result<()> {
    for field in fields.iter_mut().filter(|field| field.number == model::METADATA_PROPS) {
        if parse_entry(field.bytes()?)?.0 == key {
            *field = with_value(field, value)?;
            return Ok(());
        }
    }
    insert(fields, model::MESSAGE, model::METADATA_PROPS, std::iter::once(Ok(encode_entry(key, value))))
}

fn with_value(field: &Field, value: &str) -> Result<Field> {
    let mut encoder = Encoder::default();
    for part in Fields::new(entry::MESSAGE, field.bytes()?) {
        let part = part?;
        if part.number != entry::VALUE {
            encoder.raw(&part);
        }
    }
    encoder.string(entry::VALUE, value);
    wrap(model::MESSAGE, model::METADATA_PROPS, &encoder)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity_branch, if_node, raw_model, reference_check, small_model};
    use super::super::{DataType, Index};
    use super::*;

    fn find(model: &Model, name: &str) -> NodeId {
        model.graph().nodes().iter().find(|node| node.name() == name).unwrap().id()
    }

    fn refused(fill: impl FnOnce(&mut Patch)) -> Error {
        let model = small_model();
        let mut patch = Patch::new("test edit");
        fill(&mut patch);
        match patch.apply(&model).unwrap_err() {
            Error::Patch { label, source } if label == "test edit" => *source,
            other => panic!("not named: {other}"),
        }
    }

    /// An adapter's edit in small: a new input with a default, a branch beside a tensor, and the sum in its place.
    #[test]
    fn a_branch_is_added_beside_a_tensor() {
        let model = small_model();
        let mut patch = Patch::new("add a branch");
        let project = find(&model, "split");
        patch
            .insert_before(project, NodeDef::new("MatMul", "branch").inputs(["x", "M"]).outputs(["branch_out"]))
            .insert_before(project, NodeDef::new("Add", "sum").inputs(["h", "branch_out"]).outputs(["h_sum"]))
            .replace_input(project, 0, "h_sum")
            .add_initializer(TensorDef::from_f32s("M", &[2, 4], &[0.0; 8]))
            .add_input(ValueDef::new("M", DataType::Float, [2.into(), 4.into()]))
            .append_node(NodeDef::new("Neg", "negate").inputs(["y"]).outputs(["minus_y"]))
            .add_output(ValueDef::new("minus_y", DataType::Float, ["batch".into(), 2.into()]))
            .set_metadata("task", "folded")
            .set_metadata("adapter", "M")
            .require_opset("", 13)
            .require_opset("com.example", 1);
        let patched = patch.apply(&model).unwrap();

        let names: Vec<_> = patched.graph().nodes().iter().map(Node::name).collect();
        assert_eq!(names, ["project", "branch", "sum", "split", "shape", "pick", "join", "negate"]);
        let index = Index::new(patched.graph());
        assert_eq!(index.consumers("h_sum").len(), 1);
        assert_eq!((patched.opset(""), patched.opset("com.example")), (Some(17), Some(1)));
        assert_eq!(patched.metadata_props(), [("task".into(), "folded".into()), ("adapter".into(), "M".into())]);
        // Existing entries are the same bytes in the same order.
        let untouched = |model: &Model| -> Vec<Vec<u8>> {
            let fields = model.graph().fields().iter().filter(|field| field.number != graph::NODE);
            fields.map(|field| field.raw.to_vec()).collect()
        };
        let (before, mut after) = (untouched(&model), untouched(&patched));
        after.retain(|field| before.contains(field));
        assert_eq!(before, after);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        patched.save(&path).unwrap();
        reference_check(&path);
        assert_eq!(Model::open(folder.path()).unwrap().to_bytes(), patched.to_bytes());
    }

    #[test]
    fn an_edit_undone_gives_the_bytes_back() {
        let model = small_model();
        let swap = |model: &Model, tensor: &str| {
            let mut patch = Patch::new("swap");
            patch.replace_input(find(model, "join"), 0, tensor);
            patch.apply(model).unwrap()
        };
        let swapped = swap(&model, "a_much_longer_name_is_not_needed_but_right");
        assert_ne!(swapped.to_bytes(), model.to_bytes());
        assert_eq!(swap(&swapped, "left").to_bytes(), model.to_bytes());
        assert_eq!(Patch::new("nothing").apply(&model).unwrap().to_bytes(), model.to_bytes());
    }

    /// The branch of an `If` is edited in place, and what the edit does not name stays.
    #[test]
    fn a_nested_graph_is_edited_where_its_nodes_are() {
        let branch = identity_branch("h", "inner");
        let producer = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h"]).encode().unwrap();
        let model = Model::from_bytes(raw_model(&[producer, if_node(&branch, "x", "y")], &["x"], &["y"])).unwrap();
        let nested = model.graph().nodes()[1].subgraphs().next().unwrap();
        let copy = nested.nodes()[0].id();
        assert_eq!(copy, NodeId(2));
        assert!(model.graph().node(copy).is_none() && nested.node(NodeId(1)).is_none());
        let edit = |model: &Model, from: &str, new: bool| {
            let mut patch = Patch::new("edit a branch");
            if new {
                patch.insert_before(copy, NodeDef::new("Add", "sum").inputs(["h", "w"]).outputs(["sum"]));
                patch.add_initializer(TensorDef::from_f32s("w", &[], &[1.0]));
            }
            let copy = model.graph().nodes()[1].subgraphs().next().unwrap().nodes().last().unwrap().id();
            patch.replace_input(copy, 0, from);
            patch.apply(model).unwrap()
        };
        let edited = edit(&model, "sum", true);
        let nested = edited.graph().nodes()[1].subgraphs().next().unwrap();
        let nodes: Vec<_> = nested.nodes().iter().map(|node| (node.name(), node.id().index(), node.inputs())).collect();
        assert_eq!(nodes[0], ("sum", 2, &["h".to_owned(), "w".to_owned()][..]));
        assert_eq!(nodes[1], ("", 3, &["sum".to_owned()][..]));
        assert_eq!(edit(&edit(&model, "x", false), "h", false).to_bytes(), model.to_bytes());
        assert_eq!(Model::from_bytes(edited.to_bytes()).unwrap().to_bytes(), edited.to_bytes());
    }

    /// A tensor of a branch comes out of the model; where another branch is taken, nothing does.
    #[test]
    fn a_tensor_of_a_branch_is_given_out() {
        let (taken, other) = (identity_branch("h", "inner"), identity_branch("h", "inner"));
        let producer = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h"]).encode().unwrap();
        let mut node = if_node(&taken, "x", "y");
        let mut attribute = Encoder::default();
        attribute.string(attribute::NAME, "else_branch");
        attribute.message(attribute::G, &other);
        node.message(node::ATTRIBUTE, &attribute);
        let model = Model::from_bytes(raw_model(&[producer, node], &["x"], &["y"])).unwrap();
        let mut patch = Patch::new("give out");
        let value = |name: &str| ValueDef::of_any_rank(name, DataType::Float);
        let name = patch.give_out(&model, NodeId(2), value("inner")).unwrap();
        assert_eq!(patch.give_out(&model, NodeId(2), value("inner")).unwrap(), name);
        assert_eq!(patch.give_out(&model, NodeId(0), value("h")).unwrap(), "h");
        assert_eq!(patch.give_out(&model, NodeId(0), value("y")).unwrap(), "y");
        assert!(matches!(patch.give_out(&model, NodeId(9), value("h")), Err(Error::NoNode { index: 9, nodes: 4 })));
        let edited = patch.apply(&model).unwrap();
        let names = |values: &[super::super::ValueInfo]| -> Vec<String> {
            values.iter().map(|value| value.name().to_owned()).collect()
        };
        assert_eq!(names(edited.graph().outputs()), ["y", "h", &name]);
        let node = &edited.graph().nodes()[1];
        assert_eq!(node.outputs(), ["y", &name]);
        let branches: Vec<&Graph> = node.subgraphs().collect();
        assert_eq!(names(branches[0].outputs()), ["inner", &format!("{name}/again")]);
        let nothing = format!("{name}/nothing");
        assert_eq!(names(branches[1].outputs()), ["inner", &nothing]);
        let constant = branches[1].nodes().last().unwrap();
        assert_eq!((constant.op_type(), constant.outputs()), ("Constant", &[nothing][..]));
        assert_eq!(constant.attribute("value").unwrap().as_tensor().unwrap().dims(), [0]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let neg = |name: &str, from: &str, to: &str| NodeDef::new("Neg", name).inputs([from]).outputs([to]);
        let last = NodeId(4);
        assert!(
            matches!(refused(|p| _ = p.append_node(neg("new", "h", "left"))), Error::Duplicate { tensor, .. } if tensor == "left")
        );
        assert!(
            matches!(refused(|p| _ = p.append_node(neg("join", "h", "n"))), Error::DuplicateNode { node } if node == "join")
        );
        assert!(
            matches!(refused(|p| _ = p.append_node(neg("new", "nowhere", "n"))), Error::Undefined { tensor, .. } if tensor == "nowhere")
        );
        assert!(matches!(
            refused(|p| _ = p.insert_before(NodeId(0), neg("new", "h", "n"))),
            Error::UseBeforeDefinition { .. }
        ));
        assert!(matches!(refused(|p| _ = p.replace_input(NodeId(0), 0, "y")), Error::Cycle { .. }));
        assert!(matches!(refused(|p| _ = p.replace_input(last, 2, "h")), Error::NoSlot { slot: 2, inputs: 2, .. }));
        assert!(matches!(refused(|p| _ = p.replace_input(NodeId(5), 0, "h")), Error::NoNode { index: 5, nodes: 5 }));
        assert!(matches!(
            refused(|p| _ = p.insert_before(NodeId(9), neg("n", "h", "n"))),
            Error::NoNode { index: 9, .. }
        ));
        assert!(matches!(
            refused(|p| _ = p.replace_input(last, 0, "h").replace_input(last, 0, "x")),
            Error::ReplacedTwice { .. }
        ));
        assert!(matches!(
            refused(|p| _ = p.require_opset("ai.onnx", 23)),
            Error::OldOpset { found: 17, needed: 23, .. }
        ));
        assert!(matches!(
            refused(|p| _ = p.append_node(neg("n", "h", "n").domain("com.microsoft"))),
            Error::NoOpset { .. }
        ));
        assert!(matches!(
            refused(|p| _ = p.add_initializer(TensorDef::from_i64s("y", &[], &[1]))),
            Error::Duplicate { .. }
        ));
        let of = |op: &str, other: &str| NodeDef::new(op, "new").inputs(["h", other]).outputs(["n"]);
        assert!(matches!(refused(|p| _ = p.append_node(of("Add", "target"))), Error::TypeConflict { .. }));
        assert!(matches!(refused(|p| _ = p.append_node(of("MatMul", "w"))), Error::ShapeConflict { .. }));
        assert!(matches!(
            refused(|p| _ = p.add_output(ValueDef::new("no", DataType::Float, []))),
            Error::OutputUndefined { .. }
        ));
    }

    /// Only what the edit adds gets another name, also where the model's own nodes come to read it.
    #[test]
    fn what_an_edit_adds_is_renamed_and_constants_are_replaced() {
        let model = small_model();
        let project = find(&model, "split");
        let mut patch = Patch::new("rename");
        patch
            .insert_before(project, NodeDef::new("MatMul", "branch").inputs(["x", "M"]).outputs(["branch_out"]))
            .insert_before(project, NodeDef::new("Add", "sum").inputs(["h", "branch_out"]).outputs(["h_sum"]))
            .replace_input(project, 0, "h_sum")
            .add_initializer(TensorDef::from_f32s("M", &[2, 4], &[0.0; 8]))
            .add_input(ValueDef::new("M", DataType::Float, [2.into(), 4.into()]))
            .rename(|name| Some(format!("second.{name}")));
        let patched = patch.apply(&model).unwrap();
        let index = Index::new(patched.graph());
        let node = |name: &str| patched.graph().node(find(&patched, name)).unwrap();
        assert_eq!(node("second.branch").inputs(), ["x", "second.M"]);
        assert_eq!(node("second.sum").inputs(), ["h", "second.branch_out"]);
        assert_eq!(node("split").input(0), Some("second.h_sum"));
        assert!(index.input("second.M").is_some() && index.initializer("second.M").is_some());

        let mut patch = Patch::new("replace");
        patch.replace_initializer(TensorDef::from_f32s("second.M", &[2, 4], &[0.5; 8]));
        let replaced = patch.apply(&patched).unwrap();
        let values = |model: &Model| Index::new(model.graph()).initializer("second.M").unwrap().to_f32s().unwrap();
        assert_eq!((values(&patched), values(&replaced)), (vec![0.0; 8], vec![0.5; 8]));
        assert_eq!(replaced.to_bytes().len(), patched.to_bytes().len(), "nothing else changes");
        let unknown = |p: &mut Patch| _ = p.replace_initializer(TensorDef::from_f32s("nowhere", &[], &[0.0]));
        assert!(matches!(refused(unknown), Error::NoInitializer { tensor } if tensor == "nowhere"));
    }
}
