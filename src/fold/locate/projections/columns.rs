//! Which columns of a packed product a part of it is: the way from the product to the part is followed with the numbers of the
//! columns in the place of values.
//!
//! ```text
//! product [B, S, N] ─ (Unsqueeze) ─ Split | Slice ─ part                       a range
//! product [B, S, N] ─ Reshape [B, S, h, 3·d] ─ Split | Slice | Gather ─ part   d columns of every head
//! ```

use super::walk::Step;
use crate::onnx::{Index, Node};

/// The longest product that is followed.
const MAX_WIDTH: usize = 1 << 20;
/// Dimensions that columns may be laid out in.
const MAX_RANK: usize = 16;
/// The longest computation of a bound that is followed.
const MAX_BOUND: usize = 16;

/// Column numbers in the shape that the tensor has behind batch and sequence.
struct Columns {
    /// Sizes of the axes; 0 stands for one that does not come from the columns.
    axes: Vec<usize>,
    /// Row-major over the axes that do.
    numbers: Vec<usize>,
}

/// The columns that are left where `width` of `total` are. `lead` axes stand before the columns of the product.
pub(super) fn columns(
    index: &Index,
    path: &[Step],
    lead: usize,
    total: usize,
    width: usize,
) -> Result<Vec<usize>, String> {
    if total > MAX_WIDTH {
        return Err(format!("a product of {total} columns is wider than those of any model"));
    }
    let axes = std::iter::repeat_n(0, lead).chain([total]).collect();
    let mut columns = Columns { axes, numbers: (0..total).collect() };
    for step in path {
        if columns.numbers.len() <= width {
            break;
        }
        let Some(node) = index.graph().node(step.node) else { continue };
        columns = columns.through(index, node, step.output).ok_or_else(|| {
            format!("`{}` ({}) cuts a packed product in a way that is not known", node.name(), node.op_type())
        })?;
    }
    if columns.numbers.len() == width {
        return Ok(columns.numbers);
    }
    Err(format!("a product of {total} columns is left with {} of them, not {width}", columns.numbers.len()))
}

impl Columns {
    fn through(self, index: &Index, node: &Node, output: usize) -> Option<Self> {
        let constant = |slot: usize| node.input(slot).and_then(|tensor| integers(index, tensor));
        let number = |slot: usize| constant(slot)?.first().copied();
        let attribute = |name: &str| node.attribute(name).and_then(|a| a.as_int());
        match node.op_type() {
            "Add" | "Cast" | "Mul" | "Identity" | "QuantizeLinear" | "DequantizeLinear" => Some(self),
            "Reshape" => self.reshape(&tail(index, node.input(1)?)?),
            "Transpose" => self.transpose(node.attribute("perm")?.as_ints()?),
            "Split" => {
                let axis = self.axis(attribute("axis").unwrap_or(0))?;
                let sizes = match node.attribute("split").and_then(|a| a.as_ints()).map(<[i64]>::to_vec).or(constant(1))
                {
                    Some(sizes) => sizes,
                    None => {
                        let parts = node.outputs().len();
                        let each = self.axes.get(axis)?.div_ceil(parts);
                        let last = self.axes.get(axis)?.checked_sub(each * (parts - 1))?;
                        (0..parts).map(|part| if part + 1 == parts { last } else { each } as i64).collect()
                    }
                };
                let start = sizes.iter().take(output).try_fold(0i64, |start, size| start.checked_add(*size))?;
                self.narrow(axis, usize::try_from(start).ok()?, usize::try_from(*sizes.get(output)?).ok()?)
            }
            "Slice" => {
                let axes = constant(3)?;
                let ([axis], None | Some(1)) = (axes.as_slice(), number(4)) else { return None };
                let axis = self.axis(*axis)?;
                let size = *self.axes.get(axis)? as i64;
                let place = |at: i64| if at < 0 { at + size } else { at }.clamp(0, size) as usize;
                let sliced = Sliced { index, tensor: node.input(0)?, axes: &self.axes };
                let (start, end) = (place(sliced.number(node.input(1)?, 0)?), place(sliced.number(node.input(2)?, 0)?));
                self.narrow(axis, start, end.checked_sub(start)?)
            }
            "Gather" => {
                let axis = self.axis(attribute("axis").unwrap_or(0))?;
                let at = number(1)?;
                let at = if at < 0 { at + *self.axes.get(axis)? as i64 } else { at };
                let mut picked = self.narrow(axis, usize::try_from(at).ok()?, 1)?;
                picked.axes.remove(axis);
                Some(picked)
            }
            "Unsqueeze" => {
                let new = node.attribute("axes").and_then(|a| a.as_ints()).map(<[i64]>::to_vec).or(constant(1))?;
                let rank = self.axes.len().checked_add(new.len()).filter(|rank| *rank <= MAX_RANK)?;
                let place = |at: i64| usize::try_from(if at < 0 { at.checked_add(rank as i64)? } else { at }).ok();
                let mut places = new.into_iter().map(place).collect::<Option<Vec<_>>>()?;
                places.sort_unstable();
                let mut wider = self;
                for at in places {
                    (at <= wider.axes.len()).then(|| wider.axes.insert(at, 1))?;
                }
                Some(wider)
            }
            "Squeeze" => {
                let axes = node.attribute("axes").and_then(|a| a.as_ints()).map(<[i64]>::to_vec).or(constant(1))?;
                let [axis] = axes.as_slice() else { return None };
                let axis = self.axis(*axis)?;
                let mut left = self;
                (left.axes.remove(axis) == 1).then_some(left)
            }
            _ => None,
        }
    }

    /// An axis that comes from the columns.
    fn axis(&self, axis: i64) -> Option<usize> {
        let axis = if axis < 0 { axis + self.axes.len() as i64 } else { axis };
        let axis = usize::try_from(axis).ok()?;
        self.axes.get(axis).is_some_and(|size| *size > 0).then_some(axis)
    }

    /// `tail` are the last numbers of the new shape that are known.
    fn reshape(self, tail: &[Option<i64>]) -> Option<Self> {
        // batch and sequence come first: only what lies behind them can be split
        if self.axes.iter().skip_while(|size| **size == 0).any(|size| *size == 0) {
            return None;
        }
        let total = self.numbers.len();
        let mut sizes = Vec::new();
        let mut left = total;
        for dim in tail.iter().rev() {
            if left == 1 {
                break;
            }
            if sizes.len() == MAX_RANK {
                return None;
            }
            let size = match dim {
                Some(size) if *size > 0 => usize::try_from(*size).ok()?,
                // what is not a number is whatever is left, if it is the last
                _ => left,
            };
            if !left.is_multiple_of(size) {
                return None;
            }
            left /= size;
            sizes.push(size);
        }
        if sizes.is_empty() || left != 1 {
            return None;
        }
        sizes.extend([0, 0]);
        sizes.reverse();
        Some(Self { axes: sizes, numbers: self.numbers })
    }

    fn transpose(self, order: &[i64]) -> Option<Self> {
        let from: Vec<usize> = order.iter().map(|axis| usize::try_from(*axis).ok()).collect::<Option<_>>()?;
        if from.len() != self.axes.len() || !(0..from.len()).all(|axis| from.contains(&axis)) {
            return None;
        }
        let mut strides = vec![0; self.axes.len()];
        let mut stride = 1;
        for (at, size) in self.axes.iter().enumerate().rev().filter(|(_, size)| **size > 0) {
            *strides.get_mut(at)? = stride;
            stride *= size;
        }
        let axes: Vec<usize> = from.iter().map(|axis| self.axes.get(*axis).copied()).collect::<Option<_>>()?;
        let mut places = vec![0];
        for axis in &from {
            let (size, stride) = (self.axes.get(*axis)?, strides.get(*axis)?);
            if *size > 0 {
                places = places.iter().flat_map(|place| (0..*size).map(move |i| place + i * stride)).collect();
            }
        }
        let numbers = places.iter().map(|place| self.numbers.get(*place).copied()).collect::<Option<_>>()?;
        Some(Self { axes, numbers })
    }

    fn narrow(self, axis: usize, start: usize, length: usize) -> Option<Self> {
        let size = *self.axes.get(axis)?;
        let inner: usize = self.axes.iter().skip(axis + 1).filter(|size| **size > 0).product();
        if length == 0 || start.checked_add(length)? > size {
            return None;
        }
        let kept = self
            .numbers
            .iter()
            .enumerate()
            .filter(|(place, _)| (start..start + length).contains(&(place / inner % size)));
        let numbers = kept.map(|(_, number)| *number).collect();
        let mut axes = self.axes;
        *axes.get_mut(axis)? = length;
        Some(Self { axes, numbers })
    }
}

/// A tensor whose shape is partly known, and bounds that are computed from it: halves, as `chunk` is exported.
struct Sliced<'a> {
    index: &'a Index<'a>,
    tensor: &'a str,
    axes: &'a [usize],
}

impl Sliced<'_> {
    fn number(&self, tensor: &str, depth: usize) -> Option<i64> {
        if let Some(numbers) = integers(self.index, tensor) {
            return numbers.first().copied();
        }
        let node = self.index.producer(tensor).filter(|_| depth < MAX_BOUND)?;
        let operand = |slot: usize| self.number(node.input(slot)?, depth + 1);
        match node.op_type() {
            "Cast" | "Squeeze" | "Unsqueeze" | "Identity" | "Reshape" => operand(0),
            "Add" => operand(0)?.checked_add(operand(1)?),
            "Sub" => operand(0)?.checked_sub(operand(1)?),
            "Mul" => operand(0)?.checked_mul(operand(1)?),
            "Div" => operand(0)?.checked_div(operand(1)?),
            "Gather" => self.size(node.input(0)?, operand(1)?, depth + 1),
            _ => None,
        }
    }

    /// One entry of a list that is the tensor's shape, or was that of the one it was transposed from.
    fn size(&self, shape: &str, axis: i64, depth: usize) -> Option<i64> {
        let axis = usize::try_from(if axis < 0 { axis + self.axes.len() as i64 } else { axis }).ok()?;
        let node = self.index.producer(shape).filter(|_| depth < MAX_BOUND)?;
        if node.is("", "Gather") {
            let order = integers(self.index, node.input(1)?)?;
            return self.size(node.input(0)?, *order.get(axis)?, depth + 1);
        }
        let start = node.attribute("start").and_then(|a| a.as_int()).unwrap_or(0);
        let whole = node.is("", "Shape") && start == 0 && node.attribute("end").is_none();
        let of = node.input(0).filter(|_| whole)?;
        let axis = if of == self.tensor {
            axis
        } else {
            let turned = self.index.producer(self.tensor).filter(|node| node.is("", "Transpose"))?;
            let order = turned.attribute("perm")?.as_ints()?.iter();
            let at = order.map(|from| usize::try_from(*from)).position(|from| from == Ok(axis))?;
            (turned.input(0) == Some(of)).then_some(at)?
        };
        self.axes.get(axis).filter(|size| **size > 0).map(|size| *size as i64)
    }
}

/// A constant list of integers, or one integer.
pub(super) fn integers(index: &Index, tensor: &str) -> Option<Vec<i64>> {
    if let Some(found) = index.initializer(tensor) {
        return found.to_i64s().ok();
    }
    let node = index.producer(tensor).filter(|node| node.is("", "Constant"))?;
    if let Some(value) = node.attribute("value").and_then(|a| a.as_tensor()) {
        return value.to_i64s().ok();
    }
    let list = node.attribute("value_ints").and_then(|a| a.as_ints()).map(<[i64]>::to_vec);
    list.or_else(|| Some(vec![node.attribute("value_int")?.as_int()?]))
}

/// The last numbers of a shape, as far as they are known one by one.
fn tail(index: &Index, shape: &str) -> Option<Vec<Option<i64>>> {
    if let Some(all) = integers(index, shape) {
        return Some(all.into_iter().map(Some).collect());
    }
    let node = index.producer(shape)?;
    if !node.is("", "Concat") {
        return None;
    }
    let mut known = Vec::new();
    for piece in node.inputs().iter().rev() {
        match integers(index, piece) {
            Some(numbers) => known.extend(numbers.into_iter().rev().map(Some)),
            None => known.push(None),
        }
    }
    known.reverse();
    Some(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{DataType, Dim, ModelBuilder, NodeDef, TensorDef, ValueDef};

    /// Widths and orders that would fill the memory.
    #[test]
    fn what_no_model_has_is_refused() {
        let model = ModelBuilder::new("g", 8).build().unwrap();
        let index = Index::new(model.graph());
        let error = columns(&index, &[], 2, 1 << 62, 8).unwrap_err();
        assert_eq!(error, "a product of 4611686018427387904 columns is wider than those of any model");
        let wide = || Columns { axes: vec![0, 0, 1 << 19], numbers: (0..1 << 19).collect() };
        assert!(wide().transpose(&[2, 2, 2]).is_none() && wide().transpose(&[0, 2, 1]).is_some());
        assert!(wide().reshape(&[Some(1); 100]).is_none());
    }

    /// GPTBigCode's queries, keys and values: a head of its own for all, and then the parts.
    #[test]
    fn an_axis_may_come_before_the_parts() {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, (0..3).map(|_| Dim::Unknown)));
        for (name, values) in [("one", &[1][..]), ("parts", &[4, 2, 2]), ("far", &[9])] {
            builder.initializer(TensorDef::from_i64s(name, &[values.len() as i64], values));
        }
        builder.node(NodeDef::new("Unsqueeze", "u").inputs(["x", "one"]).outputs(["u"]));
        builder.node(NodeDef::new("Split", "s").inputs(["u", "parts"]).outputs(["q", "k", "v"]).attr_int("axis", 3));
        builder.node(NodeDef::new("Unsqueeze", "f").inputs(["x", "far"]).outputs(["f"]));
        for name in ["v", "f"] {
            builder.output(ValueDef::new(name, DataType::Float, []));
        }
        let model = builder.build().unwrap();
        let index = Index::new(model.graph());
        let step = |name: &str, output: usize| {
            let node = model.graph().nodes().iter().find(|node| node.name() == name).unwrap();
            Step { node: node.id(), output }
        };
        let part = |output: usize, width| columns(&index, &[step("u", 0), step("s", output)], 2, 8, width);
        assert_eq!((part(0, 4), part(1, 2), part(2, 2)), (Ok(vec![0, 1, 2, 3]), Ok(vec![4, 5]), Ok(vec![6, 7])));
        let error = columns(&index, &[step("f", 0)], 2, 8, 4).unwrap_err();
        assert_eq!(error, "`f` (Unsqueeze) cuts a packed product in a way that is not known");
    }

    /// A third of the last dimension, of the tensor or, as ONNX Runtime's optimizer leaves it, of the one before its Transpose.
    #[test]
    fn bounds_are_computed_from_shapes() {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, (0..4).map(|_| Dim::Unknown)));
        builder.output(ValueDef::new("part", DataType::Float, []));
        for (name, values) in
            [("zero", &[0][..]), ("last", &[-1]), ("order", &[0, 2, 1, 3]), ("two", &[2]), ("three", &[3])]
        {
            builder.initializer(TensorDef::from_i64s(name, &[values.len() as i64], values));
        }
        let node = |op: &str, inputs: &[&str], output: &str| {
            NodeDef::new(op, output).inputs(inputs.iter().copied()).outputs([output])
        };
        builder.node(node("Transpose", &["x"], "turned").attr_ints("perm", &[0, 2, 1, 3]));
        builder.node(node("Shape", &["x"], "before").attr_int("start", 0));
        builder.node(node("Gather", &["before", "order"], "after"));
        builder.node(node("Gather", &["after", "last"], "size"));
        builder.node(node("Add", &["size", "two"], "rounded"));
        builder.node(node("Div", &["rounded", "three"], "third"));
        builder.node(node("Gather", &["after", "zero"], "rows"));
        builder.node(node("Slice", &["turned", "zero", "third", "last"], "part"));
        let model = builder.build().unwrap();
        let index = Index::new(model.graph());
        let axes = [0, 4, 0, 96];
        let number = |tensor: &str, axes: &[usize], name: &str| Sliced { index: &index, tensor, axes }.number(name, 0);
        assert_eq!(number("turned", &axes, "third"), Some(32));
        // batch is not known, and a shape of another tensor says nothing
        assert_eq!(number("turned", &axes, "rows"), None);
        assert_eq!(number("part", &axes, "third"), None);
    }
}
