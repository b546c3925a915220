//! The declared type of a graph input, output or intermediate value.

use std::fmt;

use super::proto::{types, value};
use super::tensor::enum_code;
use super::wire::Fields;
use super::{Bytes, DataType, Result};

/// One dimension of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A fixed size.
    Value(i64),
    /// A named size, equal wherever the name stands.
    Param(String),
    /// Any size.
    Unknown,
}

impl From<i64> for Dim {
    fn from(value: i64) -> Self {
        Self::Value(value)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Self::Param(name.to_owned())
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "{value}"),
            Self::Param(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// The declared type of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// A dense tensor.
    Tensor {
        /// The element type.
        elem_type: DataType,
        /// The shape; none when not even the rank is known.
        shape: Option<Vec<Dim>>,
    },
    /// A sequence, a map, an optional or a sparse tensor; or no type at all.
    Other,
}

/// A named value with its declared type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueInfo {
    name: String,
    value_type: ValueType,
}

impl ValueInfo {
    pub(crate) fn parse(body: &Bytes) -> Result<Self> {
        let mut info = Self { name: String::new(), value_type: ValueType::Other };
        for field in Fields::new(value::MESSAGE, body) {
            let field = field?;
            match field.number {
                value::NAME => info.name = field.string()?,
                value::TYPE => info.value_type = parse_type(field.bytes()?)?,
                _ => {}
            }
        }
        Ok(info)
    }

    /// The value's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The declared type.
    pub fn value_type(&self) -> &ValueType {
        &self.value_type
    }

    /// The element type, if it is a tensor.
    pub fn elem_type(&self) -> Option<DataType> {
        match self.value_type {
            ValueType::Tensor { elem_type, .. } => Some(elem_type),
            ValueType::Other => None,
        }
    }

    /// The shape, if it is a tensor of known rank.
    pub fn shape(&self) -> Option<&[Dim]> {
        match &self.value_type {
            ValueType::Tensor { shape, .. } => shape.as_deref(),
            ValueType::Other => None,
        }
    }
}

fn parse_type(body: &Bytes) -> Result<ValueType> {
    let mut value_type = ValueType::Other;
    for field in Fields::new(types::MESSAGE, body) {
        let field = field?;
        if field.number == types::TENSOR_TYPE {
            value_type = parse_tensor_type(field.bytes()?)?;
        }
    }
    Ok(value_type)
}

fn parse_tensor_type(body: &Bytes) -> Result<ValueType> {
    let mut code = 0;
    let mut shape = None;
    for field in Fields::new("TypeProto.Tensor", body) {
        let field = field?;
        match field.number {
            types::ELEM_TYPE => code = enum_code(&field)?,
            types::SHAPE => shape = Some(parse_shape(field.bytes()?)?),
            _ => {}
        }
    }
    Ok(ValueType::Tensor { elem_type: DataType::from_code(code), shape })
}

fn parse_shape(body: &Bytes) -> Result<Vec<Dim>> {
    let mut dims = Vec::new();
    for field in Fields::new("TensorShapeProto", body) {
        let field = field?;
        if field.number == types::DIM {
            dims.push(parse_dim(field.bytes()?)?);
        }
    }
    Ok(dims)
}

fn parse_dim(body: &Bytes) -> Result<Dim> {
    let mut dim = Dim::Unknown;
    for field in Fields::new("TensorShapeProto.Dimension", body) {
        let field = field?;
        match field.number {
            types::DIM_VALUE => dim = Dim::Value(field.int()?),
            types::DIM_PARAM => dim = Dim::Param(field.string()?),
            _ => {}
        }
    }
    Ok(match dim {
        Dim::Param(name) if name.is_empty() => Dim::Unknown,
        dim => dim,
    })
}
