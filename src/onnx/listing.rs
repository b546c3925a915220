//! A graph as text: one line for each input, output, constant and node.

use std::fmt::{self, Write};

use super::{Attribute, AttributeValue, Graph, Node, Storage, TensorInfo, ValueInfo};

/// How many elements of a list or a small tensor are shown.
const SHOWN: usize = 8;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(self, 0, f)
    }
}

fn list(graph: &Graph, indent: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let pad = " ".repeat(indent * 2);
    writeln!(f, "{pad}graph {:?}", graph.name())?;
    for input in graph.inputs() {
        writeln!(f, "{pad}  input {input}")?;
    }
    for output in graph.outputs() {
        writeln!(f, "{pad}  output {output}")?;
    }
    for tensor in graph.initializers() {
        writeln!(f, "{pad}  const {}: {tensor}", Name(tensor.name()))?;
    }
    for sparse in graph.sparse_initializers() {
        writeln!(f, "{pad}  const {}: sparse {:?} of {}", Name(sparse.values.name()), sparse.dims, sparse.values)?;
    }
    for node in graph.nodes() {
        writeln!(f, "{pad}  {node}")?;
        for subgraph in node.subgraphs() {
            list(subgraph, indent + 2, f)?;
        }
    }
    Ok(())
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        names(f, self.outputs())?;
        f.write_str(" = ")?;
        if !self.domain().is_empty() {
            write!(f, "{}.", Name(self.domain()))?;
        }
        write!(f, "{}", Name(self.op_type()))?;
        if !self.attributes().is_empty() {
            f.write_char('[')?;
            separated(f, self.attributes(), |f, attribute| write!(f, "{attribute}"))?;
            f.write_char(']')?;
        }
        f.write_char('(')?;
        names(f, self.inputs())?;
        f.write_char(')')
    }
}

impl fmt::Display for ValueInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", Name(self.name()))?;
        let Some(elem_type) = self.elem_type() else { return f.write_str("not a tensor") };
        write!(f, "{elem_type}")?;
        let Some(shape) = self.shape() else { return f.write_str("[…]") };
        f.write_char('[')?;
        separated(f, shape, |f, dim| write!(f, "{dim}"))?;
        f.write_char(']')
    }
}

/// Type, shape, and values or where they are.
impl fmt::Display for TensorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.data_type(), self.dims())?;
        match self.storage() {
            Storage::External(external) => write!(f, " in {:?} at {}", external.location, external.offset),
            Storage::Raw(_) | Storage::Typed if is_small(self) => small_values(f, self),
            Storage::Raw(_) | Storage::Typed => Ok(()),
        }
    }
}

/// Integers or floats, as the type decides; values of other types are not shown.
fn small_values(f: &mut fmt::Formatter<'_>, tensor: &TensorInfo) -> fmt::Result {
    if let Ok(values) = tensor.to_i64s() {
        f.write_str(" {")?;
        separated(f, values, |f, value| write!(f, "{value}"))?;
        return f.write_char('}');
    }
    let Ok(values) = tensor.to_f32s() else { return Ok(()) };
    f.write_str(" {")?;
    separated(f, values, |f, value| write!(f, "{value:?}"))?;
    f.write_char('}')
}

fn is_small(tensor: &TensorInfo) -> bool {
    let elements = tensor.dims().iter().try_fold(1i64, |product, &dim| product.checked_mul(dim));
    elements.is_some_and(|elements| (0..=SHOWN as i64).contains(&elements))
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=", Name(self.name()))?;
        match self.value() {
            AttributeValue::Float(value) => write!(f, "{value:?}"),
            AttributeValue::Int(value) => write!(f, "{value}"),
            AttributeValue::String(value) => write!(f, "{:?}", String::from_utf8_lossy(value)),
            AttributeValue::Tensor(tensor) => write!(f, "{tensor}"),
            AttributeValue::Floats(values) => shortened(f, values, |f, value| write!(f, "{value:?}")),
            AttributeValue::Ints(values) => shortened(f, values, |f, value| write!(f, "{value}")),
            AttributeValue::Strings(values) => {
                shortened(f, values, |f, value| write!(f, "{:?}", String::from_utf8_lossy(value)))
            }
            AttributeValue::Tensors(tensors) => shortened(f, tensors, |f, tensor| write!(f, "{tensor}")),
            AttributeValue::Graph(graph) => write!(f, "graph {:?}", graph.name()),
            AttributeValue::Graphs(graphs) => shortened(f, graphs, |f, graph| write!(f, "graph {:?}", graph.name())),
            AttributeValue::SparseTensors(tensors) => {
                shortened(f, tensors, |f, sparse| write!(f, "sparse {:?}", sparse.dims))
            }
            AttributeValue::Reference(name) => write!(f, "@{}", Name(name)),
            AttributeValue::Other => f.write_str("…"),
        }
    }
}

/// A name without the control characters that would act on a terminal.
struct Name<'a>(&'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

fn names(f: &mut fmt::Formatter<'_>, names: &[String]) -> fmt::Result {
    separated(f, names, |f, name| if name.is_empty() { f.write_char('_') } else { write!(f, "{}", Name(name)) })
}

fn shortened<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    item: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    f.write_char('[')?;
    separated(f, items.iter().take(SHOWN), item)?;
    f.write_str(if items.len() > SHOWN { ", …]" } else { "]" })
}

fn separated<T>(
    f: &mut fmt::Formatter<'_>,
    items: impl IntoIterator<Item = T>,
    item: impl Fn(&mut fmt::Formatter<'_>, T) -> fmt::Result,
) -> fmt::Result {
    for (position, value) in items.into_iter().enumerate() {
        if position > 0 {
            f.write_str(", ")?;
        }
        item(f, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity_branch, if_node, raw_model, small_model};
    use super::super::{Model, NodeDef};

    #[test]
    fn a_graph_reads_as_text() {
        insta::assert_snapshot!(small_model().graph(), @r#"
        graph "small"
          input x: float[batch, 2]
          output y: float[batch, 2]
          const w: float[2, 4] {1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 0.5, 0.0}
          const a_much_longer_name_is_not_needed_but_right: float[2] {0.0, 1.0}
          h = MatMul(x, w)
          left, right = Split[axis=-1](h)
          target = Constant[value=int64[2] {0, -1}]()
          right_2d = Reshape(right, target)
          y = Add(left, right_2d)
        "#);
    }

    #[test]
    fn branches_are_indented() {
        let node = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h\u{1b}[2J"]).encode().unwrap();
        let branch = if_node(&identity_branch("x", "inner"), "x", "y");
        let model = Model::from_bytes(raw_model(&[node, branch], &["x"], &["y"])).unwrap();
        insta::assert_snapshot!(model.graph(), @r#"
        graph "g"
          input x: float[]
          output y: float[]
          h\u{1b}[2J = Neg(x)
          y = If[then_branch=graph "branch"](x)
            graph "branch"
              output inner: float[]
              inner = Identity(x)
        "#);
    }
}
