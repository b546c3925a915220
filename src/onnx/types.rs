//! Element types and shapes, as far as common operators tell.
//!
//! A check for edits, not shape inference: what an operator that is not listed here makes is unknown, and only what is known
//! on both sides can be in conflict. Declared types of values in between are not believed, since converters leave stale ones
//! behind; inputs, constants and operators are.

use std::collections::HashMap;

use super::{DataType, Dim, Error, Model, Node, Result, TensorInfo, ValueInfo};

/// A dimension; none where it is not a number.
type Size = Option<i64>;

/// Dimensions of the largest shape that is believed: each node that hands one on has a copy of it.
const MAX_RANK: usize = 64;

/// What is known of a tensor.
#[derive(Clone, Debug, Default)]
struct Known {
    elem: Option<DataType>,
    shape: Option<Vec<Size>>,
}

impl Known {
    fn of_value(value: &ValueInfo) -> Self {
        // Some exporters write 0 or -1 where a size is open.
        let size = |dim: &Dim| if let Dim::Value(size @ 1..) = dim { Some(*size) } else { None };
        Self {
            elem: value.elem_type().filter(|elem| *elem != DataType::Undefined),
            shape: value.shape().filter(|shape| shape.len() <= MAX_RANK).map(|shape| shape.iter().map(size).collect()),
        }
    }

    fn of_tensor(tensor: &TensorInfo) -> Self {
        let dims = Some(tensor.dims()).filter(|dims| dims.len() <= MAX_RANK);
        let shape = dims.map(|dims| dims.iter().copied().map(Some).collect());
        Self { elem: Some(tensor.data_type()), shape }
    }
}

/// Operators that give a tensor of the type and shape of their first input.
const SAME: [&str; 25] = [
    "Abs",
    "Celu",
    "Clip",
    "Cos",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "Identity",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "Neg",
    "RMSNormalization",
    "Reciprocal",
    "Relu",
    "Selu",
    "Sigmoid",
    "Sin",
    "Softmax",
    "Softplus",
    "Sqrt",
    "Tanh",
];
/// Operators on two tensors or more of one type, which are broadcast.
const BROADCAST: [&str; 8] = ["Add", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum"];
/// The same, with truth values as the result.
const COMPARE: [&str; 5] = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"];
/// Operators that give a tensor of their first input's type, in a shape of their own.
const RESHAPE: [&str; 12] = [
    "Expand",
    "Flatten",
    "Gather",
    "Pad",
    "ReduceMax",
    "ReduceMean",
    "ReduceSum",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Unsqueeze",
];

/// Checks that the standard operators of a model's main graph are given types and shapes that go together, where both are
/// known.
///
/// # Errors
/// The first conflict, with node and tensors.
pub fn check_types(model: &Model) -> Result<()> {
    let graph = model.graph();
    let mut known: HashMap<&str, Known> = HashMap::with_capacity(graph.nodes().len());
    known.extend(graph.inputs().iter().map(|value| (value.name(), Known::of_value(value))));
    for tensor in graph.initializers() {
        let constant = Known::of_tensor(tensor);
        if let Some(input) = known.get(tensor.name()) {
            agree(input, &constant, &format!("input `{}`", tensor.name()), tensor.name())?;
        }
        known.insert(tensor.name(), constant);
    }
    for node in graph.nodes() {
        let result = infer(node, &known)?;
        if let Some(output) = node.output(0) {
            known.insert(output, result);
        }
    }
    for output in graph.outputs() {
        if let Some(found) = known.get(output.name()) {
            agree(&Known::of_value(output), found, &format!("output `{}`", output.name()), output.name())?;
        }
    }
    Ok(())
}

/// A declared type and the one that is found.
fn agree(declared: &Known, found: &Known, what: &str, tensor: &str) -> Result<()> {
    let fits = |a: &Size, b: &Size| a.is_none() || b.is_none() || a == b;
    if let (Some(declared), Some(found)) = (declared.elem, found.elem)
        && declared != found
    {
        return Err(Error::TypeConflict {
            node: what.to_owned(),
            first: "its declaration".into(),
            first_type: declared,
            second: tensor.to_owned(),
            second_type: found,
        });
    }
    if let (Some(a), Some(b)) = (&declared.shape, &found.shape)
        && !(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| fits(a, b)))
    {
        let reason = format!("is declared as {} and is {}", show(a), show(b));
        return Err(Error::ShapeConflict { node: what.to_owned(), reason });
    }
    Ok(())
}

fn show(shape: &[Size]) -> String {
    let sizes: Vec<_> = shape.iter().map(|size| size.map_or("?".into(), |size| size.to_string())).collect();
    format!("[{}]", sizes.join(", "))
}

/// What a node's first output is.
fn infer(node: &Node, known: &HashMap<&str, Known>) -> Result<Known> {
    let unknown = Known::default();
    let input = |slot: usize| node.input(slot).and_then(|name| known.get(name)).unwrap_or(&unknown);
    if !node.domain().is_empty() {
        return Ok(unknown);
    }
    let op = node.op_type();
    if SAME.contains(&op) {
        return Ok(input(0).clone());
    }
    if RESHAPE.contains(&op) {
        return Ok(Known { elem: input(0).elem, shape: None });
    }
    if BROADCAST.contains(&op) || COMPARE.contains(&op) {
        let elem = one_type(node, 0, known)?;
        let elem = if COMPARE.contains(&op) { Some(DataType::Bool) } else { elem };
        return Ok(Known { elem, shape: broadcast_all(node, 0, known)? });
    }
    Ok(match op {
        "Constant" => node.attribute("value").and_then(|a| a.as_tensor()).map_or(unknown, Known::of_tensor),
        "Cast" => {
            let code = node.attribute("to").and_then(|a| a.as_int()).and_then(|code| i32::try_from(code).ok());
            Known { elem: code.map(DataType::from_code), shape: input(0).shape.clone() }
        }
        "Pow" => Known { elem: input(0).elem, shape: broadcast_all(node, 0, known)? },
        "Where" => Known { elem: one_type(node, 1, known)?, shape: broadcast_all(node, 0, known)? },
        "MatMul" => Known { elem: one_type(node, 0, known)?, shape: product(node, input(0), input(1))? },
        "Transpose" => Known { elem: input(0).elem, shape: transposed(node, input(0))? },
        "Concat" => Known { elem: one_type(node, 0, known)?, shape: None },
        "Shape" => Known { elem: Some(DataType::Int64), shape: Some(vec![None]) },
        _ => unknown,
    })
}

/// The type of all inputs from a slot on, which have one.
fn one_type(node: &Node, from: usize, known: &HashMap<&str, Known>) -> Result<Option<DataType>> {
    let mut first: Option<(&str, DataType)> = None;
    for name in node.inputs().iter().skip(from) {
        let Some(found) = known.get(name.as_str()).and_then(|known| known.elem) else { continue };
        match first {
            Some((earlier, elem)) if elem != found => {
                return Err(Error::TypeConflict {
                    node: node.label(),
                    first: format!("`{earlier}`"),
                    first_type: elem,
                    second: name.clone(),
                    second_type: found,
                });
            }
            Some(_) => {}
            None => first = Some((name, found)),
        }
    }
    Ok(first.map(|(_, elem)| elem))
}

fn broadcast_all(node: &Node, from: usize, known: &HashMap<&str, Known>) -> Result<Option<Vec<Size>>> {
    let mut result: Option<Vec<Size>> = Some(Vec::new());
    for name in node.inputs().iter().skip(from) {
        let shape = known.get(name.as_str()).and_then(|known| known.shape.as_ref());
        result = match (result, shape) {
            (Some(a), Some(b)) => {
                let conflict = || Error::ShapeConflict {
                    node: node.label(),
                    reason: format!("cannot broadcast {} with {}", show(&a), show(b)),
                };
                Some(broadcast(&a, b).ok_or_else(conflict)?)
            }
            _ => None,
        };
    }
    Ok(result)
}

/// The shape of two broadcast shapes; none when they do not go together.
fn broadcast(a: &[Size], b: &[Size]) -> Option<Vec<Size>> {
    let rank = a.len().max(b.len());
    // Missing dimensions, at the front, are ones.
    let at = |shape: &[Size], i: usize| {
        (i + shape.len()).checked_sub(rank).map_or(Some(1), |i| shape.get(i).copied().flatten())
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(1), size) | (size, Some(1)) => Some(size),
            (Some(a), Some(b)) => (a == b).then_some(Some(a)),
            (Some(size), None) | (None, Some(size)) => Some(Some(size)),
            (None, None) => Some(None),
        })
        .collect()
}

fn product(node: &Node, a: &Known, b: &Known) -> Result<Option<Vec<Size>>> {
    let (Some(a), Some(b)) = (&a.shape, &b.shape) else { return Ok(None) };
    let conflict =
        || Error::ShapeConflict { node: node.label(), reason: format!("cannot multiply {} with {}", show(a), show(b)) };
    let inner_a = a.last().ok_or_else(conflict)?;
    let inner_b = b.iter().rev().nth(1).or(b.last()).ok_or_else(conflict)?;
    if matches!((inner_a, inner_b), (Some(a), Some(b)) if a != b) {
        return Err(conflict());
    }
    let ([outer_a @ .., rows, _], [outer_b @ .., _, columns]) = (&a[..], &b[..]) else { return Ok(None) };
    let mut shape = broadcast(outer_a, outer_b).ok_or_else(conflict)?;
    shape.extend([*rows, *columns]);
    Ok(Some(shape))
}

fn transposed(node: &Node, input: &Known) -> Result<Option<Vec<Size>>> {
    let Some(shape) = &input.shape else { return Ok(None) };
    let Some(order) = node.attribute("perm").and_then(|a| a.as_ints()) else {
        return Ok(Some(shape.iter().rev().copied().collect()));
    };
    let moved = order.iter().map(|&axis| shape.get(usize::try_from(axis).ok()?).copied()).collect::<Option<Vec<_>>>();
    match moved.filter(|moved| moved.len() == shape.len()) {
        Some(moved) => Ok(Some(moved)),
        None => Err(Error::ShapeConflict {
            node: node.label(),
            reason: format!("cannot order {} as {order:?}", show(shape)),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ModelBuilder, NodeDef, TensorDef, ValueDef};
    use super::*;

    /// What the check says of `node`, which makes `y` from `x`, float32 `[batch, 4, 8]`, and constants.
    fn verdict(node: NodeDef) -> String {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).opset("com.example", 1);
        builder.input(ValueDef::new("x", DataType::Float, ["batch".into(), 4.into(), 8.into()]));
        builder.initializer(TensorDef::from_f32s("square", &[8, 8], &[0.0; 64]));
        builder.initializer(TensorDef::from_f32s("row", &[8], &[0.0; 8]));
        builder.initializer(TensorDef::from_f32s("three", &[3], &[0.0; 3]));
        builder.initializer(TensorDef::from_f32s("scalar", &[], &[0.0]));
        builder.initializer(TensorDef::from_i64s("integers", &[8], &[0; 8]));
        builder.initializer(TensorDef::inline("halves", DataType::Float16, &[8, 8], vec![0; 128]));
        builder.node(node.outputs(["y"]));
        builder.node(NodeDef::new("Elu", "reader").inputs(["y"]).outputs(["z"]));
        builder.node(NodeDef::new("Add", "sum").inputs(["z", "row"]).outputs(["out"]));
        builder.output(ValueDef::new("out", DataType::Float, ["batch".into(), 4.into(), 8.into()]));
        check_types(&builder.build().unwrap()).map_or_else(|error| error.to_string(), |()| "fits".into())
    }

    fn binary(op: &str, a: &str, b: &str) -> String {
        verdict(NodeDef::new(op, "n").inputs([a, b]))
    }

    #[test]
    fn what_goes_together_passes() {
        assert_eq!(binary("MatMul", "x", "square"), "fits");
        assert_eq!(binary("Add", "x", "row"), "fits");
        assert_eq!(binary("Mul", "scalar", "x"), "fits");
        assert_eq!(binary("Pow", "x", "integers"), "fits");
        assert_eq!(verdict(NodeDef::new("Unknown", "n").domain("com.example").inputs(["integers"])), "fits");
    }

    #[test]
    fn what_does_not_is_named() {
        assert_eq!(
            binary("MatMul", "x", "halves"),
            "node `n` (MatMul) is given `x` of type float and `halves` of type float16"
        );
        assert_eq!(
            binary("Add", "x", "integers"),
            "node `n` (Add) is given `x` of type float and `integers` of type int64"
        );
        assert_eq!(binary("Add", "x", "three"), "node `n` (Add): cannot broadcast [?, 4, 8] with [3]");
        assert_eq!(binary("MatMul", "square", "x"), "node `n` (MatMul): cannot multiply [8, 8] with [?, 4, 8]");
        assert_eq!(binary("MatMul", "x", "three"), "node `n` (MatMul): cannot multiply [?, 4, 8] with [3]");
        assert_eq!(binary("MatMul", "x", "scalar"), "node `n` (MatMul): cannot multiply [?, 4, 8] with []");
        assert_eq!(
            verdict(NodeDef::new("Transpose", "n").inputs(["x"]).attr_ints("perm", &[1, 0])),
            "node `n` (Transpose): cannot order [?, 4, 8] as [1, 0]"
        );
        // a wrong result is found where it is read
        assert_eq!(
            verdict(NodeDef::new("Cast", "n").inputs(["x"]).attr_int("to", DataType::Int64.code().into())),
            "node `sum` (Add) is given `z` of type int64 and `row` of type float"
        );
        assert_eq!(
            verdict(NodeDef::new("Transpose", "n").inputs(["square"])),
            "output `out`: is declared as [?, 4, 8] and is [8, 8]"
        );
    }
}
