//! Nodes written beside an operator that hides its query, and what the graph says of the sizes that they need.

use super::{Layout, QuerySource, Site};
use crate::onnx::{Dim, Index, NodeDef, TensorDef};

/// The domain of ONNX Runtime's operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// Collects the nodes of one query. Names begin with the layer; what every layer shares begins with what it is made of, and
/// is written once.
pub(super) struct Beside {
    /// What the names of the graph begin with: `/prefold/`, and in a branch its name.
    root: String,
    prefix: String,
    nodes: Vec<NodeDef>,
    initializers: Vec<TensorDef>,
}

impl Beside {
    pub(super) fn new(site: &Site) -> Self {
        let prefix = format!("{}/query", site.prefix());
        Self { root: site.root(), prefix, nodes: Vec::new(), initializers: Vec::new() }
    }

    /// Writes what layers share under names that begin with `name`, and comes back to the own ones.
    pub(super) fn under<T>(&mut self, name: &str, write: impl FnOnce(&mut Self) -> T) -> T {
        let prefix = format!("{}{name}", self.root);
        let own = std::mem::replace(&mut self.prefix, prefix);
        let written = write(self);
        self.prefix = own;
        written
    }

    /// A node of the standard operators under the last part of its name; returns its output.
    pub(super) fn node(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        self.node_with(name, inputs, |name| NodeDef::new(op, name))
    }

    pub(super) fn node_with(&mut self, name: &str, inputs: &[&str], node: impl FnOnce(String) -> NodeDef) -> String {
        let name = format!("{}/{name}", self.prefix);
        let output = format!("{name}/output_0");
        self.nodes.push(node(name).inputs(inputs.iter().copied()).outputs([output.as_str()]));
        output
    }

    /// A list of integers.
    pub(super) fn list(&mut self, name: &str, values: &[i64]) -> String {
        self.constant(name, &[values.len() as i64], values)
    }

    /// One integer, without dimensions.
    pub(super) fn integer(&mut self, name: &str, value: i64) -> String {
        self.constant(name, &[], &[value])
    }

    fn constant(&mut self, name: &str, dims: &[i64], values: &[i64]) -> String {
        let name = format!("{}/{name}", self.prefix);
        self.tensor(TensorDef::from_i64s(name, dims, values))
    }

    pub(super) fn tensor(&mut self, tensor: TensorDef) -> String {
        let name = tensor.name().to_owned();
        self.initializers.push(tensor);
        name
    }

    /// The name that a constant would have.
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// Positions `from..to` of one axis.
    pub(super) fn slice(&mut self, name: &str, x: &str, axis: i64, from: &str, to: &str) -> String {
        let axes = self.list(&format!("{name}/axes"), &[axis]);
        self.node("Slice", name, &[x, from, to, &axes])
    }

    /// The first `count` positions of one axis.
    pub(super) fn first(&mut self, name: &str, x: &str, axis: i64, count: i64) -> String {
        let from = self.list(&format!("{name}/starts"), &[0]);
        let to = self.list(&format!("{name}/ends"), &[count]);
        self.slice(name, x, axis, &from, &to)
    }

    /// `[batch, seq, groups · head_dim]` as `[batch, heads, seq, head_dim]`, of which the first `heads` groups are kept.
    pub(super) fn split_heads(&mut self, x: &str, groups: i64, heads: i64) -> String {
        let shape = self.list("Reshape/shape", &[0, 0, groups, -1]);
        let mut split = self.node("Reshape", "Reshape", &[x, &shape]);
        if heads < groups {
            split = self.first("Slice", &split, 2, heads);
        }
        self.heads_first(&split)
    }

    /// `[batch, seq, heads, head_dim]` with its heads first.
    pub(super) fn heads_first(&mut self, x: &str) -> String {
        self.node_with("Transpose", &[x], |name| NodeDef::new("Transpose", name).attr_ints("perm", &[0, 2, 1, 3]))
    }

    /// The size of one axis, as a list of one number.
    pub(super) fn size(&mut self, name: &str, x: &str, axis: i64) -> String {
        let shape = self.node("Shape", &format!("{name}/Shape"), &[x]);
        let axis = self.list(&format!("{name}/axis"), &[axis]);
        self.node("Gather", name, &[&shape, &axis])
    }

    pub(super) fn finish(self, tensor: String, layout: Layout) -> QuerySource {
        QuerySource { tensor, layout, nodes: self.nodes, initializers: self.initializers }
    }
}

/// A tensor that the graph holds.
pub(super) fn shown(tensor: &str, layout: Layout) -> QuerySource {
    QuerySource { tensor: tensor.to_owned(), layout, nodes: Vec::new(), initializers: Vec::new() }
}

/// The rank of a tensor, where the graph declares it.
pub(super) fn rank(index: &Index, tensor: &str) -> Option<usize> {
    let declared = index.value(tensor).and_then(|value| value.shape()).map(<[Dim]>::len);
    declared.or_else(|| index.initializer(tensor).map(|initializer| initializer.dims().len()))
}

/// The last dimension of a tensor, where the graph tells: declared, that of a constant, or of what made it.
pub(super) fn last_dim(index: &Index, tensor: &str) -> Option<i64> {
    last_dim_within(index, tensor, 8)
}

fn last_dim_within(index: &Index, tensor: &str, steps: usize) -> Option<i64> {
    if let Some(initializer) = index.initializer(tensor) {
        return initializer.dims().last().copied();
    }
    if let Some(Dim::Value(size)) = index.value(tensor).and_then(|value| value.shape()).and_then(<[Dim]>::last) {
        return Some(*size);
    }
    let (node, steps) = (index.producer(tensor)?, steps.checked_sub(1)?);
    let of = |slot: usize| last_dim_within(index, node.input(slot)?, steps);
    match (node.domain(), node.op_type()) {
        ("", "MatMul") => of(1),
        ("", "Gemm") if node.attribute("transB").and_then(|a| a.as_int()).unwrap_or(0) == 0 => of(1),
        (MICROSOFT, "MatMulNBits") => node.attribute("N")?.as_int(),
        ("", "Reshape") => constant_ints(index, node.input(1)?)?.last().copied().filter(|size| *size > 0),
        ("", "Concat") if node.attribute("axis").and_then(|a| a.as_int()) == Some(0) => of(0),
        // a bias of this width, or of any other that broadcasts
        ("", "Add" | "Mul") => of(0).into_iter().chain(of(1)).max(),
        ("", "Cos" | "Sin" | "Cast" | "Identity") => of(0),
        _ => None,
    }
}

/// The integers of a constant.
fn constant_ints(index: &Index, tensor: &str) -> Option<Vec<i64>> {
    if let Some(initializer) = index.initializer(tensor) {
        return initializer.to_i64s().ok();
    }
    let constant = index.producer(tensor).filter(|node| node.is("", "Constant"))?;
    constant.attribute("value")?.as_tensor()?.to_i64s().ok()
}
