//! Small ways to break a graph.

use std::ops::Range;

use prefold::onnx::{Model, Node, NodeDef, NodeId, Patch, TensorDef};

/// A node of the main graph by its name; `/prefold.1/` is where a fold's nodes are.
pub fn node<'m>(model: &'m Model, name: &str) -> &'m Node {
    let found = model.graph().nodes().iter().find(|node| node.name() == name);
    found.unwrap_or_else(|| panic!("there is no node {name}"))
}

fn done(patch: Patch, model: &Model) -> Model {
    patch.apply(model).unwrap()
}

/// Lets a slot of a node read another tensor.
pub fn read(model: &Model, name: &str, slot: usize, tensor: &str) -> Model {
    let mut patch = Patch::new("mutant");
    patch.replace_input(node(model, name).id(), slot, tensor);
    done(patch, model)
}

/// Puts nodes before a node; the last one's output is what the slot of that node reads then.
pub fn insert(
    model: &Model,
    name: &str,
    slot: usize,
    constants: Vec<TensorDef>,
    nodes: Vec<NodeDef>,
    last: &str,
) -> Model {
    let mut patch = Patch::new("mutant");
    let id = node(model, name).id();
    constants.into_iter().for_each(|tensor| {
        patch.add_initializer(tensor);
    });
    nodes.into_iter().for_each(|node| {
        patch.insert_before(id, node);
    });
    patch.replace_input(id, slot, last);
    done(patch, model)
}

/// Lets all readers of a tensor read `last`, which `nodes` make from it; they stand before the first node.
pub fn behind(model: &Model, tensor: &str, constants: Vec<TensorDef>, nodes: Vec<NodeDef>, last: &str) -> Model {
    let mut patch = Patch::new("mutant");
    let readers: Vec<(NodeId, usize)> = model
        .graph()
        .nodes()
        .iter()
        .flat_map(|node| {
            node.inputs().iter().enumerate().filter(|(_, input)| *input == tensor).map(|(slot, _)| (node.id(), slot))
        })
        .collect();
    constants.into_iter().for_each(|tensor| {
        patch.add_initializer(tensor);
    });
    nodes.into_iter().for_each(|node| {
        patch.insert_before(readers[0].0, node);
    });
    for (id, slot) in readers {
        patch.replace_input(id, slot, last);
    }
    done(patch, model)
}

/// The name that what gave an output of the graph has after [`replace_output`].
pub fn inner(output: &str) -> String {
    format!("{}~", &output[..output.len() - 1])
}

/// Lets `nodes` give an output of the graph, as `last`, from [`inner`], which is what gave it before and what its readers read.
pub fn replace_output(
    model: &Model,
    output: &str,
    constants: Vec<TensorDef>,
    nodes: Vec<NodeDef>,
    last: &str,
) -> Model {
    // the node's output in its message: field 2, and a name of the same length
    let (mut bytes, inner) = (model.to_bytes(), inner(output));
    let made = [&[0x12, output.len() as u8], output.as_bytes()].concat();
    let at = (0..bytes.len() - made.len()).find(|at| bytes[*at..].starts_with(&made)).unwrap();
    bytes[at + 2..at + made.len()].copy_from_slice(inner.as_bytes());
    let model = Model::from_bytes(bytes).unwrap();
    let mut patch = Patch::new("mutant");
    for node in model.graph().nodes() {
        let readers = node.inputs().iter().enumerate().filter(|(_, input)| *input == output);
        readers.for_each(|(slot, _)| {
            patch.replace_input(node.id(), slot, inner.as_str());
        });
    }
    constants.into_iter().for_each(|tensor| {
        patch.add_initializer(tensor);
    });
    nodes.into_iter().for_each(|node| {
        patch.append_node(node);
    });
    patch.append_node(NodeDef::new("Identity", "mutant/output").inputs([last]).outputs([output]));
    done(patch, &model)
}

/// Values of a float constant, with its dimensions.
pub fn values(model: &Model, tensor: &str) -> (Vec<i64>, Vec<f32>) {
    let found = model.graph().initializers().iter().find(|found| found.name() == tensor);
    let found = found.unwrap_or_else(|| panic!("there is no constant {tensor}"));
    (found.dims().to_vec(), found.to_f32s().unwrap())
}

/// Changes the values of a float constant.
pub fn weight(model: &Model, tensor: &str, change: impl Fn(&[i64], Vec<f32>) -> Vec<f32>) -> Model {
    let (dims, found) = values(model, tensor);
    let mut patch = Patch::new("mutant");
    patch.replace_initializer(TensorDef::from_f32s(tensor, &dims, &change(&dims, found)));
    done(patch, model)
}

/// Exchanges two constants of one shape.
pub fn swap(model: &Model, a: &str, b: &str) -> Model {
    let (first, second) = (values(model, a).1, values(model, b).1);
    let model = weight(model, a, |_, _| second.clone());
    weight(&model, b, |_, _| first.clone())
}

/// Columns of a constant that hold a linear map, alone or beside others behind a `Split`.
fn columns(model: &Model, layer: usize, map: &str) -> (String, Range<usize>) {
    let weight = |module: &str| format!("model.layers.{layer}.{module}.MatMul.weight");
    let initializers = model.graph().initializers();
    if initializers.iter().any(|found| found.name() == weight(map)) {
        let width = values(model, &weight(map)).0[1] as usize;
        return (weight(map), 0..width);
    }
    let packed = if map.starts_with("mlp") { "mlp.gate_up_proj" } else { "self_attn.qkv_proj" };
    let split = node(model, &format!("/model/layers.{layer}/{}/Split", packed.replace('.', "/")));
    let widths = initializers.iter().find(|found| Some(found.name()) == split.input(1)).unwrap().to_i64s().unwrap();
    let product = format!("/model/layers.{layer}/{}/output_0", map.replace('.', "/"));
    let at = split.outputs().iter().position(|output| *output == product).unwrap();
    let start = widths[..at].iter().sum::<i64>() as usize;
    (weight(packed), start..start + widths[at] as usize)
}

/// The values of a linear map, `[in, out]`.
fn map_values(model: &Model, layer: usize, map: &str) -> Vec<f32> {
    let (tensor, columns) = columns(model, layer, map);
    let (dims, found) = values(model, &tensor);
    found.chunks(dims[1] as usize).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

/// Changes a linear map, `[in, out]`, whose name is that of its module: `self_attn.q_proj`.
pub fn map(model: &Model, layer: usize, map: &str, change: impl Fn(&[i64], Vec<f32>) -> Vec<f32>) -> Model {
    let (tensor, columns) = columns(model, layer, map);
    let own = map_values(model, layer, map);
    weight(model, &tensor, |dims, mut found| {
        let changed = change(&[dims[0], columns.len() as i64], own.clone());
        let rows = found.chunks_mut(dims[1] as usize).zip(changed.chunks(columns.len()));
        rows.for_each(|(row, own)| row[columns.clone()].copy_from_slice(own));
        found
    })
}

/// Exchanges two linear maps of one shape.
pub fn swap_maps(model: &Model, a: (usize, &str), b: (usize, &str)) -> Model {
    let (first, second) = (map_values(model, a.0, a.1), map_values(model, b.0, b.1));
    let model = map(model, a.0, a.1, |_, _| second.clone());
    map(&model, b.0, b.1, |_, _| first.clone())
}

/// Changes the bytes of an attribute in the `nth` node that has it: `value` replaces what stands after `tag` in its message.
pub fn attribute(model: &Model, name: &str, nth: usize, tag: u8, value: &[u8]) -> Model {
    let mut bytes = model.to_bytes();
    let mut pattern = vec![0x0a, name.len() as u8];
    pattern.extend(name.as_bytes());
    pattern.push(tag);
    let found = (0..bytes.len() - pattern.len()).filter(|at| bytes[*at..].starts_with(&pattern)).nth(nth);
    let at = found.unwrap_or_else(|| panic!("no attribute {name}")) + pattern.len();
    bytes[at..at + value.len()].copy_from_slice(value);
    Model::from_bytes(bytes).unwrap()
}

/// A node with its inputs, whose only output has its name.
pub fn op(kind: &str, name: &str, inputs: &[&str]) -> NodeDef {
    NodeDef::new(kind, name).inputs(inputs.iter().copied()).outputs([name])
}

/// Rounds to the mantissa bits that are given, as a product in TF32 (10) or bf16 (7) does with what it reads.
pub fn rounded(values: Vec<f32>, bits: u32) -> Vec<f32> {
    let drop = 23 - bits;
    let round = |x: f32| f32::from_bits((x.to_bits() + (1 << (drop - 1))) & !((1 << drop) - 1));
    values.into_iter().map(round).collect()
}
