//! Attributes of nodes.

use super::proto::attribute;
use super::tensor::{SparseTensor, TensorInfo};
use super::wire::Fields;
use super::{Bytes, Graph, Result};

/// The value of an attribute.
#[derive(Clone, Debug)]
pub enum AttributeValue {
    /// A float.
    Float(f32),
    /// An integer.
    Int(i64),
    /// A string; UTF-8 by convention only.
    String(Bytes),
    /// A tensor.
    Tensor(TensorInfo),
    /// A nested graph: a branch or a loop body.
    Graph(Box<Graph>),
    /// Floats.
    Floats(Vec<f32>),
    /// Integers.
    Ints(Vec<i64>),
    /// Strings.
    Strings(Vec<Bytes>),
    /// Tensors.
    Tensors(Vec<TensorInfo>),
    /// Nested graphs.
    Graphs(Vec<Graph>),
    /// One sparse tensor or several.
    SparseTensors(Vec<SparseTensor>),
    /// Inside a function: the value of the caller's attribute of this name.
    Reference(String),
    /// A type, or a kind of value that this version does not know.
    Other,
}

/// A named attribute of a node.
#[derive(Clone, Debug)]
pub struct Attribute {
    name: String,
    value: AttributeValue,
}

/// Every field that may hold a value, before the type says which one does.
#[derive(Default)]
struct Parts {
    float: f32,
    int: i64,
    string: Option<Bytes>,
    tensors: Vec<Bytes>,
    graphs: Vec<Bytes>,
    floats: Vec<u8>,
    ints: Vec<i64>,
    strings: Vec<Bytes>,
    sparse: Vec<Bytes>,
    reference: String,
}

impl Attribute {
    /// `depth` is how many graphs are around the attribute.
    pub(crate) fn parse(body: &Bytes, depth: usize) -> Result<Self> {
        let mut name = String::new();
        let mut declared = None;
        let mut implied = 0;
        let mut parts = Parts::default();
        for field in Fields::new(attribute::MESSAGE, body) {
            let field = field?;
            if let Some(kind) = implied_type(field.number) {
                implied = kind;
            }
            match field.number {
                attribute::NAME => name = field.string()?,
                attribute::TYPE => declared = Some(field.int()?),
                attribute::F => parts.float = field.float()?,
                attribute::I => parts.int = field.int()?,
                attribute::S => parts.string = Some(field.bytes()?.clone()),
                attribute::T | attribute::TENSORS => parts.tensors.push(field.bytes()?.clone()),
                attribute::G | attribute::GRAPHS => parts.graphs.push(field.bytes()?.clone()),
                attribute::FLOATS => field.fixed32s(&mut parts.floats)?,
                attribute::INTS => field.ints(&mut parts.ints)?,
                attribute::STRINGS => parts.strings.push(field.bytes()?.clone()),
                attribute::SPARSE_TENSOR | attribute::SPARSE_TENSORS => parts.sparse.push(field.bytes()?.clone()),
                attribute::REF_ATTR_NAME => parts.reference = field.string()?,
                _ => {}
            }
        }
        // The first versions of the format had no type field.
        let kind = declared.filter(|&kind| kind != 0).unwrap_or(implied);
        Ok(Self { name, value: parts.value(kind, depth)? })
    }

    /// The attribute's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The attribute's value.
    pub fn value(&self) -> &AttributeValue {
        &self.value
    }

    /// The value as an integer, if it is one.
    pub fn as_int(&self) -> Option<i64> {
        if let AttributeValue::Int(value) = self.value { Some(value) } else { None }
    }

    /// The value as a float, if it is one.
    pub fn as_float(&self) -> Option<f32> {
        if let AttributeValue::Float(value) = self.value { Some(value) } else { None }
    }

    /// The value as text, if it is a string of UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        if let AttributeValue::String(value) = &self.value { std::str::from_utf8(value).ok() } else { None }
    }

    /// The value as integers, if it is a list of them.
    pub fn as_ints(&self) -> Option<&[i64]> {
        if let AttributeValue::Ints(values) = &self.value { Some(values) } else { None }
    }

    /// The value as floats, if it is a list of them.
    pub fn as_floats(&self) -> Option<&[f32]> {
        if let AttributeValue::Floats(values) = &self.value { Some(values) } else { None }
    }

    /// The value as a tensor, if it is one.
    pub fn as_tensor(&self) -> Option<&TensorInfo> {
        if let AttributeValue::Tensor(value) = &self.value { Some(value) } else { None }
    }

    /// The graphs that the attribute holds: none, one or several.
    pub fn graphs(&self) -> &[Graph] {
        match &self.value {
            AttributeValue::Graph(graph) => std::slice::from_ref(graph),
            AttributeValue::Graphs(graphs) => graphs,
            _ => &[],
        }
    }

    pub(crate) fn graphs_mut(&mut self) -> &mut [Graph] {
        match &mut self.value {
            AttributeValue::Graph(graph) => std::slice::from_mut(graph),
            AttributeValue::Graphs(graphs) => graphs,
            _ => &mut [],
        }
    }
}

fn implied_type(field: u32) -> Option<i64> {
    Some(match field {
        attribute::F => attribute::TYPE_FLOAT,
        attribute::I => attribute::TYPE_INT,
        attribute::S => attribute::TYPE_STRING,
        attribute::T => attribute::TYPE_TENSOR,
        attribute::G => attribute::TYPE_GRAPH,
        attribute::FLOATS => attribute::TYPE_FLOATS,
        attribute::INTS => attribute::TYPE_INTS,
        attribute::STRINGS => attribute::TYPE_STRINGS,
        attribute::TENSORS => attribute::TYPE_TENSORS,
        attribute::GRAPHS => attribute::TYPE_GRAPHS,
        attribute::SPARSE_TENSOR => attribute::TYPE_SPARSE_TENSOR,
        attribute::SPARSE_TENSORS => attribute::TYPE_SPARSE_TENSORS,
        _ => return None,
    })
}

impl Parts {
    fn value(self, kind: i64, depth: usize) -> Result<AttributeValue> {
        if !self.reference.is_empty() {
            return Ok(AttributeValue::Reference(self.reference));
        }
        let empty = || Bytes::from(Vec::new());
        // A missing singular field stands for its default, as everywhere in protobuf.
        Ok(match kind {
            attribute::TYPE_FLOAT => AttributeValue::Float(self.float),
            attribute::TYPE_INT => AttributeValue::Int(self.int),
            attribute::TYPE_STRING => AttributeValue::String(self.string.unwrap_or_else(empty)),
            attribute::TYPE_TENSOR => {
                AttributeValue::Tensor(TensorInfo::parse(self.tensors.last().unwrap_or(&empty()))?)
            }
            attribute::TYPE_GRAPH => {
                AttributeValue::Graph(Box::new(Graph::parse(self.graphs.last().unwrap_or(&empty()), depth)?))
            }
            attribute::TYPE_FLOATS => {
                let floats = self.floats.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                AttributeValue::Floats(floats.collect())
            }
            attribute::TYPE_INTS => AttributeValue::Ints(self.ints),
            attribute::TYPE_STRINGS => AttributeValue::Strings(self.strings),
            attribute::TYPE_TENSORS => AttributeValue::Tensors(collect(&self.tensors, TensorInfo::parse)?),
            attribute::TYPE_GRAPHS => AttributeValue::Graphs(collect(&self.graphs, |g| Graph::parse(g, depth))?),
            attribute::TYPE_SPARSE_TENSOR | attribute::TYPE_SPARSE_TENSORS => {
                AttributeValue::SparseTensors(collect(&self.sparse, SparseTensor::parse)?)
            }
            _ => AttributeValue::Other,
        })
    }
}

fn collect<T>(bodies: &[Bytes], parse: impl Fn(&Bytes) -> Result<T>) -> Result<Vec<T>> {
    bodies.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::super::wire::Encoder;
    use super::*;

    fn attribute_of(fill: impl FnOnce(&mut Encoder)) -> Attribute {
        let mut encoder = Encoder::default();
        encoder.string(attribute::NAME, "a");
        fill(&mut encoder);
        Attribute::parse(&encoder.into_bytes().into(), 0).unwrap()
    }

    #[test]
    fn the_declared_type_decides_and_a_missing_one_is_implied() {
        let zero = attribute_of(|e| e.int(attribute::TYPE, attribute::TYPE_INT));
        assert_eq!(zero.as_int(), Some(0));
        let implied = attribute_of(|e| e.string(attribute::S, "same"));
        assert_eq!(implied.as_str(), Some("same"));
        let empty = attribute_of(|e| e.int(attribute::TYPE, attribute::TYPE_INTS));
        assert_eq!(empty.as_ints(), Some(&[][..]));
        let unknown = attribute_of(|e| e.int(attribute::TYPE, 99));
        assert!(matches!(unknown.value(), AttributeValue::Other));
        let reference = attribute_of(|e| e.string(attribute::REF_ATTR_NAME, "alpha"));
        assert!(matches!(reference.value(), AttributeValue::Reference(name) if name == "alpha"));
    }
}
