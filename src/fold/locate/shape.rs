//! What a graph says of shapes without being run.

use crate::onnx::{Index, Node, TensorInfo};

/// Nodes that one question may go through: an end to every walk.
const MAX_STEPS: usize = 256;
/// Tensors that one question may look at: a node may read any number of them.
const MAX_LOOKS: usize = 16 * MAX_STEPS;
/// Elements of a list that may be a shape.
const MAX_LIST: usize = 64;
/// Elements of a constant that may be one number many times.
const MAX_UNIFORM: usize = 4096;

/// The number of dimensions of a tensor, where the graph tells.
pub(in crate::fold) fn rank(index: &Index, tensor: &str) -> Option<usize> {
    Reader::new(index).rank(tensor)
}

/// The dimensions that a Reshape gives its output: those that are numbers, and none where they are computed.
pub(in crate::fold) fn target(index: &Index, reshape: &Node) -> Option<Vec<Option<i64>>> {
    Reader::new(index).list(reshape.input(1)?)
}

/// The constant of this name, be it an initializer or a node's. An initializer that is an input too, as all were before IR version 4,
/// counts by its default.
pub(in crate::fold) fn constant<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g TensorInfo> {
    let node = || index.producer(tensor).filter(|n| n.is("", "Constant"))?.attribute("value")?.as_tensor();
    index.initializer(tensor).or_else(node)
}

/// Whether a tensor is one number: a constant of one element, or what arithmetic makes of such and of dimensions.
pub(in crate::fold) fn is_number(index: &Index, tensor: &str) -> bool {
    Reader::new(index).number(tensor, false)
}

/// Whether a tensor is one number, maybe many times.
pub(in crate::fold) fn is_uniform(index: &Index, tensor: &str) -> bool {
    Reader { many: true, ..Reader::new(index) }.number(tensor, false)
}

/// Whether a tensor is computed, and of nothing but numbers and dimensions.
pub(in crate::fold) fn is_computed_number(index: &Index, tensor: &str) -> bool {
    let mut reader = Reader { many: true, ..Reader::new(index) };
    let (mut open, mut computed) = (vec![tensor], false);
    while let Some(tensor) = open.pop() {
        if reader.look().is_none() {
            return false;
        }
        if let Some(constant) = constant(index, tensor) {
            let is_list = elements(constant).is_some_and(|count| count <= MAX_LIST) && constant.to_i64s().is_ok();
            if !is_list && !reader.number(tensor, true) {
                return false;
            }
            continue;
        }
        let Some(node) = reader.producer(tensor) else { return false };
        computed = true;
        match node.op_type() {
            "Constant" | "Shape" | "Size" => {}
            // what they make depends on what a subgraph reads, or on chance
            "If" | "Loop" | "Scan" | "Multinomial" | "RandomNormal" | "RandomUniform" => return false,
            _ => {
                let inputs = node.inputs().iter().map(String::as_str).filter(|input| !input.is_empty());
                open.extend(inputs.take(MAX_LOOKS));
            }
        }
    }
    computed
}

/// Whether a constant has several elements, which are all one number.
fn repeats(constant: &TensorInfo) -> bool {
    let values = elements(constant).filter(|count| *count <= MAX_UNIFORM).and_then(|_| constant.to_f32s().ok());
    values.is_some_and(|values| !values.is_empty() && values.windows(2).all(|pair| pair.first() == pair.last()))
}

/// How many elements a constant has; none where its dimensions make no sense.
fn elements(constant: &TensorInfo) -> Option<usize> {
    let mut sizes = constant.dims().iter().map(|dim| usize::try_from(*dim).ok());
    sizes.try_fold(1usize, |product, size| product.checked_mul(size?))
}

/// Whether a node multiplies matrices, be they of floats or of integers.
pub(in crate::fold) fn is_product(node: &Node) -> bool {
    matches!(
        node.op_type(),
        "MatMul"
            | "Gemm"
            | "FusedMatMul"
            | "FusedGemm"
            | "MatMulNBits"
            | "MatMulBnb4"
            | "MatMulInteger"
            | "MatMulIntegerToFloat"
            | "DynamicQuantizeMatMul"
            | "QLinearMatMul"
            | "QGemm"
            | "Conv"
            | "FusedConv"
            | "Einsum"
    )
}

/// Whether a tensor holds weights: a constant behind nodes that only lay it out or restore its precision.
pub(in crate::fold) fn is_weight(index: &Index, tensor: &str) -> bool {
    Reader::new(index).weight(tensor)
}

/// Answers questions, as long as there are steps left.
pub(super) struct Reader<'i, 'g> {
    index: &'i Index<'g>,
    steps: usize,
    looks: usize,
    /// Whether a number may stand there many times.
    many: bool,
}

impl<'i, 'g> Reader<'i, 'g> {
    pub(super) fn new(index: &'i Index<'g>) -> Self {
        Self { index, steps: MAX_STEPS, looks: MAX_LOOKS, many: false }
    }

    /// Whether a tensor is not computed from what the graph is fed: a weight, or a number.
    pub(super) fn constant(&mut self, tensor: &str) -> bool {
        self.weight(tensor) || self.number(tensor, false)
    }

    fn weight(&mut self, tensor: &str) -> bool {
        let mut tensor = tensor;
        loop {
            if self.index.initializer(tensor).is_some() {
                return true;
            }
            let Some(node) = self.producer(tensor) else { return false };
            match (node.op_type(), node.input(0)) {
                ("Constant", _) => return true,
                (
                    "Cast" | "DequantizeLinear" | "Identity" | "QuantizeLinear" | "Reshape" | "Transpose" | "Unsqueeze",
                    Some(behind),
                ) => {
                    tensor = behind;
                }
                _ => return false,
            }
        }
    }

    fn look(&mut self) -> Option<()> {
        self.looks = self.looks.checked_sub(1)?;
        Some(())
    }

    /// The node behind a tensor, as long as there are steps left.
    fn producer(&mut self, tensor: &str) -> Option<&'g Node> {
        self.steps = self.steps.checked_sub(1)?;
        self.index.producer(tensor)
    }

    fn rank(&mut self, tensor: &str) -> Option<usize> {
        self.look()?;
        if let Some(shape) = self.index.value(tensor).and_then(|value| value.shape()) {
            return Some(shape.len());
        }
        if let Some(constant) = constant(self.index, tensor) {
            return Some(constant.dims().len());
        }
        let node = self.producer(tensor)?;
        match node.op_type() {
            "Transpose" => match node.attribute("perm").and_then(|perm| perm.as_ints()) {
                Some(perm) => Some(perm.len()),
                None => self.rank(node.input(0)?),
            },
            "Reshape" => Some(self.list(node.input(1)?)?.len()),
            "Expand" => Some(self.rank(node.input(0)?)?.max(self.list(node.input(1)?)?.len())),
            "Unsqueeze" => Some(self.rank(node.input(0)?)? + self.axes(node)?),
            "Squeeze" => self.rank(node.input(0)?)?.checked_sub(self.axes(node)?),
            "Gather" => (self.rank(node.input(0)?)? + self.rank(node.input(1)?)?).checked_sub(1),
            "Gemm" => Some(2),
            "Range" | "Shape" => Some(1),
            "Add" | "Sub" | "Mul" | "Div" | "Where" | "MatMul" | "FusedMatMul" | "And" => {
                let ranks: Vec<Option<usize>> = node.inputs().iter().map(|input| self.rank(input)).collect();
                // a scale, a bias or a weight tells nothing of what it meets
                let told = |rank: &usize| *rank > 2 || ranks.iter().all(Option::is_some);
                ranks.iter().flatten().max().copied().filter(told)
            }
            // products with weights of two dimensions
            "MatMulNBits" | "MatMulBnb4" => self.rank(node.input(0)?),
            "MatMulInteger" | "MatMulIntegerToFloat" | "DynamicQuantizeMatMul" => {
                Some(self.rank(node.input(0)?)?.max(self.rank(node.input(1)?)?))
            }
            "QLinearMatMul" => Some(self.rank(node.input(0)?)?.max(self.rank(node.input(3)?)?)),
            "BiasGelu"
            | "BiasSplitGelu"
            | "Cast"
            | "Clip"
            | "Concat"
            | "CumSum"
            | "DequantizeLinear"
            | "Dropout"
            | "DynamicQuantizeLinear"
            | "Elu"
            | "Exp"
            | "FastGelu"
            | "Gelu"
            | "HardSigmoid"
            | "Identity"
            | "LayerNormalization"
            | "Neg"
            | "Pow"
            | "QLinearAdd"
            | "QLinearMul"
            | "QuantizeLinear"
            | "QuickGelu"
            | "RMSNormalization"
            | "Reciprocal"
            | "Relu"
            | "RotaryEmbedding"
            | "Sigmoid"
            | "SimplifiedLayerNormalization"
            | "SkipLayerNormalization"
            | "SkipSimplifiedLayerNormalization"
            | "Slice"
            | "Softmax"
            | "Split"
            | "Sqrt"
            | "Tanh" => self.rank(node.input(0)?),
            _ => None,
        }
    }

    /// How many axes a Squeeze or Unsqueeze names.
    fn axes(&mut self, node: &Node) -> Option<usize> {
        match node.attribute("axes").and_then(|axes| axes.as_ints()) {
            Some(axes) => Some(axes.len()),
            None => Some(self.list(node.input(1)?)?.len()),
        }
    }

    /// The elements of a list of integers: those that are constants, and none where they are computed.
    fn list(&mut self, tensor: &str) -> Option<Vec<Option<i64>>> {
        self.look()?;
        if let Some(constant) = constant(self.index, tensor) {
            elements(constant).filter(|count| *count <= MAX_LIST)?;
            return Some(constant.to_i64s().ok()?.into_iter().map(Some).collect());
        }
        let node = self.producer(tensor)?;
        match node.op_type() {
            "Constant" => {
                let values = node.attribute("value_ints")?.as_ints()?;
                (values.len() <= MAX_LIST).then(|| values.iter().copied().map(Some).collect())
            }
            "Concat" => {
                let mut whole = Vec::new();
                for input in node.inputs() {
                    whole.extend(self.list(input)?);
                    (whole.len() <= MAX_LIST).then_some(())?;
                }
                Some(whole)
            }
            "Unsqueeze" => {
                let inner = constant(self.index, node.input(0)?).and_then(|c| c.to_i64s().ok()?.first().copied());
                Some(vec![inner])
            }
            "Shape" => {
                let bound = |name: &str| node.attribute(name).and_then(|a| a.as_int());
                let (start, end) = (bound("start").unwrap_or(0), bound("end").unwrap_or(i64::MAX));
                // torch's exporter reads one dimension at a time, of tensors whose rank need not be known
                let one = start >= 0 && end == start.saturating_add(1);
                let count = if one { 1 } else { length(self.rank(node.input(0)?)?, start, end) };
                Some(vec![None; count])
            }
            "Slice" => {
                let whole = self.list(node.input(0)?)?;
                let at = |slot: usize| constant(self.index, node.input(slot)?)?.to_i64s().ok()?.first().copied();
                let (start, end) = (at(1)?, at(2)?);
                let (from, count) = (clamp(start, whole.len()), length(whole.len(), start, end));
                Some(whole.into_iter().skip(from).take(count).collect())
            }
            "Gather" => Some(vec![None; self.list(node.input(1)?)?.len()]),
            "Cast" | "Identity" => self.list(node.input(0)?),
            // a list that is laid out as the list that it is
            "Reshape" => {
                let flat = self.list(node.input(1)?)? == [Some(-1)];
                if flat { self.list(node.input(0)?) } else { None }
            }
            "Where" | "Mul" => {
                let lists = node.inputs().iter().filter_map(|input| self.list(input));
                Some(vec![None; lists.map(|list| list.len()).max()?])
            }
            _ => None,
        }
    }

    /// `inside`: behind an operator, where a Shape need not be one number by itself.
    fn number(&mut self, tensor: &str, inside: bool) -> bool {
        if self.look().is_none() {
            return false;
        }
        if let Some(constant) = constant(self.index, tensor) {
            return elements(constant) == Some(1) || self.many && repeats(constant);
        }
        let Some(node) = self.producer(tensor) else { return false };
        match node.op_type() {
            "Constant" => {
                let has = |name: &str| node.attribute(name).is_some();
                let ints = node.attribute("value_ints").and_then(|list| list.as_ints());
                let floats = node.attribute("value_floats").and_then(|list| list.as_floats());
                has("value_float")
                    || has("value_int")
                    || ints.is_some_and(|list| list.len() == 1)
                    || floats.is_some_and(|list| list.len() == 1)
            }
            "Shape" => inside,
            "Size" => true,
            "ConstantOfShape" => self.many,
            "Expand" | "Tile" if !self.many => false,
            "Abs" | "Cast" | "CastLike" | "Ceil" | "DequantizeLinear" | "Exp" | "Expand" | "Floor" | "Gather"
            | "Identity" | "Log" | "Neg" | "QuantizeLinear" | "Reciprocal" | "ReduceMax" | "ReduceMean"
            | "ReduceMin" | "ReduceProd" | "ReduceSum" | "Reshape" | "Slice" | "Sqrt" | "Squeeze" | "Tile"
            | "Transpose" | "Unsqueeze" => node.input(0).is_some_and(|input| self.number(input, true)),
            "Concat" => node.inputs().len() == 1 && node.input(0).is_some_and(|input| self.number(input, true)),
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Clip" | "Max" | "Mean" | "Min" | "Sum" | "Where" => {
                node.inputs().iter().filter(|input| !input.is_empty()).all(|input| self.number(input, true))
            }
            _ => false,
        }
    }
}

/// A bound of a slice, counted from the end where it is negative.
fn clamp(bound: i64, len: usize) -> usize {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let bound = if bound < 0 { bound.saturating_add(len) } else { bound };
    usize::try_from(bound.clamp(0, len)).unwrap_or(0)
}

fn length(rank: usize, start: i64, end: i64) -> usize {
    clamp(end, rank).saturating_sub(clamp(start, rank))
}
