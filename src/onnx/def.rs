//! New nodes, tensors and values, as they are written down before they are part of a model.

use super::data_type::DataType;
use super::external::ExternalRef;
use super::node::standard_domain;
use super::proto::{attribute, entry, function, node, opset, tensor, types, value};
use super::value::Dim;
use super::wire::Encoder;
use super::{Error, Result};

/// A new node.
///
/// ```
/// use prefold::onnx::NodeDef;
///
/// let softmax = NodeDef::new("Softmax", "attn/softmax").inputs(["scores"]).outputs(["weights"]).attr_int("axis", -1);
/// ```
#[derive(Clone, Debug)]
pub struct NodeDef {
    op_type: String,
    name: String,
    domain: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    attributes: Vec<(String, AttributeDef)>,
}

#[derive(Clone, Debug)]
enum AttributeDef {
    Int(i64),
    Float(f32),
    String(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
    Tensor(TensorDef),
}

impl NodeDef {
    /// A node of a standard operator.
    pub fn new(op_type: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            op_type: op_type.into(),
            name: name.into(),
            domain: String::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// Takes the operator from another operator set, for instance `com.microsoft`.
    pub fn domain(mut self, domain: &str) -> Self {
        standard_domain(domain).clone_into(&mut self.domain);
        self
    }

    /// Adds tensors to read; an empty name leaves an optional input out.
    pub fn inputs<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.inputs.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds tensors to make; an empty name leaves an optional output out.
    pub fn outputs<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.outputs.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds an integer attribute.
    pub fn attr_int(self, name: &str, value: i64) -> Self {
        self.attr(name, AttributeDef::Int(value))
    }

    /// Adds a float attribute.
    pub fn attr_float(self, name: &str, value: f32) -> Self {
        self.attr(name, AttributeDef::Float(value))
    }

    /// Adds a string attribute.
    pub fn attr_string(self, name: &str, value: &str) -> Self {
        self.attr(name, AttributeDef::String(value.to_owned()))
    }

    /// Adds an attribute that lists integers.
    pub fn attr_ints(self, name: &str, values: &[i64]) -> Self {
        self.attr(name, AttributeDef::Ints(values.to_vec()))
    }

    /// Adds an attribute that lists floats.
    pub fn attr_floats(self, name: &str, values: &[f32]) -> Self {
        self.attr(name, AttributeDef::Floats(values.to_vec()))
    }

    /// Adds an attribute that lists strings.
    pub fn attr_strings(self, name: &str, values: &[&str]) -> Self {
        self.attr(name, AttributeDef::Strings(values.iter().map(|&value| value.to_owned()).collect()))
    }

    /// Adds a tensor attribute.
    pub fn attr_tensor(self, name: &str, value: TensorDef) -> Self {
        self.attr(name, AttributeDef::Tensor(value))
    }

    fn attr(mut self, name: &str, value: AttributeDef) -> Self {
        self.attributes.push((name.to_owned(), value));
        self
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its operator.
    pub(crate) fn op_type(&self) -> &str {
        &self.op_type
    }

    /// The tensors that it reads.
    pub(crate) fn inputs_read(&self) -> &[String] {
        &self.inputs
    }

    /// The tensors that it makes.
    pub(crate) fn outputs_made(&self) -> &[String] {
        &self.outputs
    }

    /// Lets `edit` change the node's name and those of what it reads and makes.
    pub(crate) fn each_name(&mut self, edit: impl Fn(&mut String)) {
        self.inputs.iter_mut().chain(&mut self.outputs).chain([&mut self.name]).for_each(edit);
    }

    pub(crate) fn encode(&self) -> Result<Encoder> {
        let mut encoder = Encoder::default();
        self.inputs.iter().for_each(|name| encoder.string(node::INPUT, name));
        self.outputs.iter().for_each(|name| encoder.string(node::OUTPUT, name));
        encoder.optional_string(node::NAME, &self.name);
        encoder.string(node::OP_TYPE, &self.op_type);
        for (name, value) in &self.attributes {
            encoder.message(node::ATTRIBUTE, &value.encode(name)?);
        }
        encoder.optional_string(node::DOMAIN, &self.domain);
        Ok(encoder)
    }
}

impl AttributeDef {
    fn encode(&self, name: &str) -> Result<Encoder> {
        let mut encoder = Encoder::default();
        encoder.string(attribute::NAME, name);
        let kind = match self {
            Self::Int(value) => {
                encoder.int(attribute::I, *value);
                attribute::TYPE_INT
            }
            Self::Float(value) => {
                encoder.float(attribute::F, *value);
                attribute::TYPE_FLOAT
            }
            Self::String(value) => {
                encoder.string(attribute::S, value);
                attribute::TYPE_STRING
            }
            Self::Ints(values) => {
                values.iter().for_each(|&value| encoder.int(attribute::INTS, value));
                attribute::TYPE_INTS
            }
            Self::Floats(values) => {
                values.iter().for_each(|&value| encoder.float(attribute::FLOATS, value));
                attribute::TYPE_FLOATS
            }
            Self::Strings(values) => {
                values.iter().for_each(|value| encoder.string(attribute::STRINGS, value));
                attribute::TYPE_STRINGS
            }
            Self::Tensor(value) => {
                encoder.message(attribute::T, &value.encode()?);
                attribute::TYPE_TENSOR
            }
        };
        encoder.int(attribute::TYPE, kind);
        Ok(encoder)
    }
}

#[derive(Clone, Debug)]
enum Values {
    Inline(Vec<u8>),
    External(ExternalRef),
}

/// A new constant tensor.
#[derive(Clone, Debug)]
pub struct TensorDef {
    name: String,
    data_type: DataType,
    dims: Vec<i64>,
    values: Values,
}

impl TensorDef {
    /// A tensor whose values are in the model, given as little-endian bytes, row-major. That their number fits type and
    /// dimensions is checked when the tensor is put into a model.
    pub fn inline(name: impl Into<String>, data_type: DataType, dims: &[i64], bytes: Vec<u8>) -> Self {
        Self { name: name.into(), data_type, dims: dims.to_vec(), values: Values::Inline(bytes) }
    }

    /// A tensor of 32-bit floats in the model.
    pub fn from_f32s(name: impl Into<String>, dims: &[i64], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::inline(name, DataType::Float, dims, bytes)
    }

    /// A tensor of 64-bit integers in the model.
    pub fn from_i64s(name: impl Into<String>, dims: &[i64], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::inline(name, DataType::Int64, dims, bytes)
    }

    /// A tensor whose values are in a file beside the model; see [`ExternalWriter`](super::ExternalWriter).
    pub fn external(name: impl Into<String>, data_type: DataType, dims: &[i64], external: ExternalRef) -> Self {
        Self { name: name.into(), data_type, dims: dims.to_vec(), values: Values::External(external) }
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tensor as a file of its own, a `TensorProto`.
    ///
    /// # Errors
    /// When its values have not the size that type and dimensions say.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(self.encode()?.into_bytes())
    }

    pub(crate) fn name_mut(&mut self) -> &mut String {
        &mut self.name
    }

    pub(crate) fn encode(&self) -> Result<Encoder> {
        self.check_size()?;
        let mut encoder = Encoder::default();
        self.dims.iter().for_each(|&dim| encoder.int(tensor::DIMS, dim));
        encoder.int(tensor::DATA_TYPE, self.data_type.code().into());
        encoder.optional_string(tensor::NAME, &self.name);
        match &self.values {
            Values::Inline(bytes) => encoder.bytes(tensor::RAW_DATA, bytes),
            Values::External(external) => {
                for (key, value) in external.entries() {
                    encoder.message(tensor::EXTERNAL_DATA, &encode_entry(key, &value));
                }
                encoder.int(tensor::DATA_LOCATION, tensor::LOCATION_EXTERNAL);
            }
        }
        Ok(encoder)
    }

    fn check_size(&self) -> Result<()> {
        let given = match &self.values {
            Values::Inline(bytes) => Some(bytes.len() as u64),
            Values::External(external) => external.length,
        };
        let expected = self.data_type.byte_len(&self.dims);
        if expected.is_some() && given.is_none_or(|given| Some(given) == expected) {
            return Ok(());
        }
        Err(Error::TensorSize {
            tensor: self.name.clone(),
            data_type: self.data_type,
            dims: self.dims.clone(),
            found: given.unwrap_or(0),
            expected,
        })
    }
}

/// A new model-local function: an operator defined by others.
#[derive(Clone, Debug)]
pub struct FunctionDef {
    domain: String,
    name: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    opsets: Vec<(String, i64)>,
    nodes: Vec<NodeDef>,
}

impl FunctionDef {
    /// Defines operator `name` of `domain` over the given operator sets.
    pub fn new(domain: &str, name: &str, opsets: &[(&str, i64)]) -> Self {
        Self {
            domain: standard_domain(domain).to_owned(),
            name: name.to_owned(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            opsets: opsets.iter().map(|(domain, version)| (standard_domain(domain).to_owned(), *version)).collect(),
            nodes: Vec::new(),
        }
    }

    /// Adds formal inputs.
    pub fn inputs<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.inputs.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds formal outputs.
    pub fn outputs<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.outputs.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds a node of the body after those that are there.
    pub fn node(mut self, node: NodeDef) -> Self {
        self.nodes.push(node);
        self
    }

    pub(crate) fn encode(&self) -> Result<Encoder> {
        let mut encoder = Encoder::default();
        encoder.string(function::NAME, &self.name);
        self.inputs.iter().for_each(|name| encoder.string(function::INPUT, name));
        self.outputs.iter().for_each(|name| encoder.string(function::OUTPUT, name));
        for node in &self.nodes {
            encoder.message(function::NODE, &node.encode()?);
        }
        for (domain, version) in &self.opsets {
            encoder.message(function::OPSET_IMPORT, &encode_opset(domain, *version));
        }
        encoder.string(function::DOMAIN, &self.domain);
        Ok(encoder)
    }
}

/// A new graph input, output or declared value: a tensor.
#[derive(Clone, Debug)]
pub struct ValueDef {
    name: String,
    data_type: DataType,
    dims: Option<Vec<Dim>>,
}

impl ValueDef {
    /// A tensor value of this type and shape.
    ///
    /// ```
    /// use prefold::onnx::{DataType, ValueDef};
    ///
    /// let logits = ValueDef::new("logits", DataType::Float, ["batch".into(), "sequence".into(), 32_000.into()]);
    /// ```
    pub fn new(name: impl Into<String>, data_type: DataType, dims: impl IntoIterator<Item = Dim>) -> Self {
        Self { name: name.into(), data_type, dims: Some(dims.into_iter().collect()) }
    }

    /// A tensor value of this type and of any rank.
    pub fn of_any_rank(name: impl Into<String>, data_type: DataType) -> Self {
        Self { name: name.into(), data_type, dims: None }
    }

    /// The value's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn name_mut(&mut self) -> &mut String {
        &mut self.name
    }

    pub(crate) fn data_type(&self) -> DataType {
        self.data_type
    }

    pub(crate) fn rank(&self) -> Option<usize> {
        self.dims.as_ref().map(Vec::len)
    }

    /// The same with sizes that are not said.
    pub(crate) fn with_any_sizes(mut self) -> Self {
        self.dims.iter_mut().flatten().for_each(|dim| *dim = Dim::Unknown);
        self
    }

    pub(crate) fn encode(&self) -> Encoder {
        let mut shape = Encoder::default();
        for dim in self.dims.iter().flatten() {
            let mut encoder = Encoder::default();
            match dim {
                Dim::Value(value) => encoder.int(types::DIM_VALUE, *value),
                Dim::Param(name) => encoder.string(types::DIM_PARAM, name),
                Dim::Unknown => {}
            }
            shape.message(types::DIM, &encoder);
        }
        let mut tensor_type = Encoder::default();
        tensor_type.int(types::ELEM_TYPE, self.data_type.code().into());
        if self.dims.is_some() {
            tensor_type.message(types::SHAPE, &shape);
        }
        let mut value_type = Encoder::default();
        value_type.message(types::TENSOR_TYPE, &tensor_type);
        let mut encoder = Encoder::default();
        encoder.string(value::NAME, &self.name);
        encoder.message(value::TYPE, &value_type);
        encoder
    }
}

/// A `StringStringEntryProto`.
pub(crate) fn encode_entry(key: &str, value: &str) -> Encoder {
    let mut encoder = Encoder::default();
    encoder.string(entry::KEY, key);
    encoder.string(entry::VALUE, value);
    encoder
}

/// An `OperatorSetIdProto`.
pub(crate) fn encode_opset(domain: &str, version: i64) -> Encoder {
    let mut encoder = Encoder::default();
    encoder.string(opset::DOMAIN, domain);
    encoder.int(opset::VERSION, version);
    encoder
}
