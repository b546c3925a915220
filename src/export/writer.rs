//! A graph under construction, with its weights on their way to disk.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::decoder::{BATCH, SEQUENCE};
use super::{DATA_NAME, Error, ExportOptions, Result, new_builder};
use crate::base::{self, DecoderSpec, WeightRole, WeightShape};
use crate::onnx::{DataType, Dim, ExternalWriter, FunctionDef, Model, ModelBuilder, NodeDef, TensorDef, ValueDef};

/// Tensors of fewer bytes stay inline even where the weights are external: shapes, norms, constants.
const SMALL: usize = 1024;

/// Where weights come from.
pub(super) type Weights<'a> = &'a dyn Fn(&WeightShape) -> base::Result<Tensor>;

/// Collects nodes and weights of one decoder.
pub(super) struct GraphWriter<'a> {
    spec: &'a DecoderSpec,
    weights: Weights<'a>,
    options: &'a ExportOptions,
    builder: ModelBuilder,
    external: Option<ExternalWriter>,
    /// Names of the constants written so far.
    constants: BTreeSet<String>,
}

impl<'a> GraphWriter<'a> {
    pub(super) fn new(
        spec: &'a DecoderSpec,
        weights: Weights<'a>,
        options: &'a ExportOptions,
        folder: &Path,
    ) -> Result<Self> {
        let bytes = (spec.num_parameters() * options.precision.dtype().size_in_bytes()) as u64;
        let external = if bytes > options.external_data_threshold {
            Some(ExternalWriter::create(folder, DATA_NAME)?)
        } else {
            None
        };
        let builder = new_builder(options);
        Ok(Self { spec, weights, options, builder, external, constants: BTreeSet::new() })
    }

    pub(super) fn spec(&self) -> &'a DecoderSpec {
        self.spec
    }

    /// The type of weights and activations.
    pub(super) fn data_type(&self) -> DataType {
        self.options.precision.data_type()
    }

    pub(super) fn options(&self) -> &'a ExportOptions {
        self.options
    }

    pub(super) fn input(&mut self, name: &str, data_type: DataType, dims: impl IntoIterator<Item = Dim>) {
        self.builder.input(ValueDef::new(name, data_type, dims));
    }

    pub(super) fn output(&mut self, name: &str, data_type: DataType, dims: impl IntoIterator<Item = Dim>) {
        self.builder.output(ValueDef::new(name, data_type, dims));
    }

    /// Says what an inner tensor `[batch, sequence, width]` is, where only a runtime knows the operator that makes it: tools that infer
    /// types, quantisers first of all, need it.
    pub(super) fn describe(&mut self, tensor: &str, width: usize) {
        let dims: [Dim; 3] = [BATCH.into(), SEQUENCE.into(), (width as i64).into()];
        let data_type = self.data_type();
        self.builder.value_info(ValueDef::new(tensor, data_type, dims));
    }

    pub(super) fn function(&mut self, function: FunctionDef) {
        self.builder.function(function);
    }

    /// Adds a node that makes the tensors it names itself.
    pub(super) fn add(&mut self, node: NodeDef) {
        self.builder.node(node);
    }

    /// Adds a standard node with one output, `{name}/output_0`, and returns the output's name.
    pub(super) fn node(&mut self, op_type: &str, name: &str, inputs: &[&str]) -> String {
        self.node_with(NodeDef::new(op_type, name), name, inputs)
    }

    /// The same for a node that carries attributes.
    pub(super) fn node_with(&mut self, node: NodeDef, name: &str, inputs: &[&str]) -> String {
        let output = format!("{name}/output_0");
        self.builder.node(node.inputs(inputs.iter().copied()).outputs([output.as_str()]));
        output
    }

    /// A cast; none where the graph's type is float32, in which norms, angles and positions are computed anyway.
    pub(super) fn cast(&mut self, name: &str, x: &str, to: DataType) -> String {
        if self.data_type() == DataType::Float { x.to_owned() } else { self.cast_always(name, x, to) }
    }

    pub(super) fn cast_always(&mut self, name: &str, x: &str, to: DataType) -> String {
        self.node_with(NodeDef::new("Cast", name).attr_int("to", to.code().into()), name, &[x])
    }

    pub(super) fn concat(&mut self, name: &str, axis: i64, inputs: &[&str]) -> String {
        self.node_with(NodeDef::new("Concat", name).attr_int("axis", axis), name, inputs)
    }

    pub(super) fn transpose(&mut self, name: &str, x: &str, permutation: &[i64]) -> String {
        self.node_with(NodeDef::new("Transpose", name).attr_ints("perm", permutation), name, &[x])
    }

    pub(super) fn reshape(&mut self, name: &str, x: &str, shape: &[i64]) -> String {
        let shape = self.integers(shape);
        self.node("Reshape", name, &[x, &shape])
    }

    pub(super) fn unsqueeze(&mut self, name: &str, x: &str, axes: &[i64]) -> String {
        let axes = self.integers(axes);
        self.node("Unsqueeze", name, &[x, &axes])
    }

    /// One dimension of a tensor as an int64 without dimensions.
    pub(super) fn dimension(&mut self, name: &str, tensor: &str, axis: i64) -> String {
        let shape = self.node("Shape", &format!("{name}/Shape"), &[tensor]);
        let index = self.integer(axis);
        let gather = NodeDef::new("Gather", format!("{name}/Gather")).attr_int("axis", 0);
        self.node_with(gather, &format!("{name}/Gather"), &[&shape, &index])
    }

    /// A shape or list of axes, written once for all that use it.
    pub(super) fn integers(&mut self, values: &[i64]) -> String {
        let listed: Vec<String> = values.iter().map(i64::to_string).collect();
        let name = format!("/model/constants/int64_[{}]", listed.join(","));
        self.constant(name, |name| TensorDef::from_i64s(name, &[values.len() as i64], values))
    }

    /// One integer without dimensions, written once.
    pub(super) fn integer(&mut self, value: i64) -> String {
        self.constant(format!("/model/constants/int64_{value}"), |name| TensorDef::from_i64s(name, &[], &[value]))
    }

    /// One float32, written once.
    pub(super) fn float(&mut self, value: f32) -> String {
        self.constant(format!("/model/constants/float_{value:e}"), |name| TensorDef::from_f32s(name, &[], &[value]))
    }

    /// One float64, written once.
    pub(super) fn double(&mut self, value: f64) -> String {
        self.doubles(&format!("/model/constants/double_{value:e}"), &[], &[value])
    }

    /// A float32 constant of its own name.
    pub(super) fn floats(&mut self, name: &str, values: &[f32]) -> String {
        self.constant(name.into(), |name| TensorDef::from_f32s(name, &[values.len() as i64], values))
    }

    /// A matrix in the graph's type, in the data file where it is large.
    pub(super) fn matrix(&mut self, name: &str, columns: usize, values: Vec<f32>) -> Result<String> {
        let rows = values.len() / columns.max(1);
        self.tensor(name, Tensor::from_vec(values, (rows, columns), &Device::Cpu))
    }

    /// A float64 constant of its own name.
    pub(super) fn doubles(&mut self, name: &str, dims: &[i64], values: &[f64]) -> String {
        let bytes = || values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(name.into(), |name| TensorDef::inline(name, DataType::Double, dims, bytes()))
    }

    /// One number in the graph's type, written once.
    pub(super) fn number(&mut self, value: f64) -> Result<String> {
        let name = format!("/model/constants/number_{value:e}");
        if self.constants.insert(name.clone()) {
            return self.tensor(&name, Tensor::new(value, &Device::Cpu));
        }
        Ok(name)
    }

    fn constant(&mut self, name: String, tensor: impl FnOnce(&str) -> TensorDef) -> String {
        if self.constants.insert(name.clone()) {
            self.builder.initializer(tensor(&name));
        }
        name
    }

    /// A weight as the decoder describes it.
    pub(super) fn weight(&mut self, role: WeightRole) -> Result<String> {
        let tensor = self.read(role)?;
        self.tensor(&role.name(), Ok(tensor))
    }

    /// A weight with a number added to each element, before it is rounded to the graph's type.
    pub(super) fn shifted_weight(&mut self, role: WeightRole, by: f64) -> Result<String> {
        let tensor = self.read(role)?;
        let shifted = if by == 0.0 { Ok(tensor) } else { tensor.to_dtype(DType::F64).and_then(|t| t + by) };
        self.tensor(&role.name(), shifted)
    }

    /// The rows of a weight from `start` on.
    pub(super) fn weight_from(&mut self, role: WeightRole, start: usize) -> Result<String> {
        let tensor = self.read(role)?;
        let rows = tensor.dim(0).and_then(|rows| tensor.narrow(0, start, rows.saturating_sub(start)));
        self.tensor(&role.name(), rows)
    }

    /// An `[out, in]` matrix as the `[in, out]` right-hand side of a MatMul.
    pub(super) fn transposed_weight(&mut self, role: WeightRole) -> Result<String> {
        let name = role.name();
        let tensor = self.read(role)?;
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        self.tensor(&format!("{stem}.MatMul.weight"), tensor.t())
    }

    /// Several `[out, in]` matrices of the same inputs as one right-hand side of a MatMul, `[in, sum of their outputs]`.
    pub(super) fn packed_transposed_weight(&mut self, stem: &str, roles: &[WeightRole]) -> Result<String> {
        let packed = self.packed(roles)?;
        self.tensor(&format!("{stem}.MatMul.weight"), packed.and_then(|t| t.t()))
    }

    /// Several weights behind each other in their first dimension.
    pub(super) fn packed_weight(&mut self, name: &str, roles: &[WeightRole]) -> Result<String> {
        let packed = self.packed(roles)?;
        self.tensor(name, packed)
    }

    /// In the graph's type: weights of one checkpoint may have several.
    fn packed(&self, roles: &[WeightRole]) -> Result<candle_core::Result<Tensor>> {
        let dtype = self.options.precision.dtype();
        let parts: Vec<_> = roles.iter().map(|role| Ok(self.read(*role)?.to_dtype(dtype))).collect::<Result<_>>()?;
        Ok(parts.into_iter().collect::<candle_core::Result<Vec<_>>>().and_then(|parts| Tensor::cat(&parts, 0)))
    }

    fn read(&self, role: WeightRole) -> Result<Tensor> {
        let weight = WeightShape { role, name: role.name(), shape: self.spec.weight_shape(role) };
        let tensor = (self.weights)(&weight)?;
        if tensor.dims() == weight.shape {
            return Ok(tensor);
        }
        Err(Error::Shape { tensor: weight.name, found: tensor.dims().to_vec(), expected: weight.shape })
    }

    /// A tensor in the graph's type, inline or in the data file.
    fn tensor(&mut self, name: &str, tensor: candle_core::Result<Tensor>) -> Result<String> {
        let convert = |source| Error::Convert { tensor: name.to_owned(), source };
        let dtype = self.options.precision.dtype();
        let tensor = tensor.and_then(|t| t.to_dtype(dtype)).and_then(|t| t.contiguous()).map_err(convert)?;
        let dims: Vec<i64> = tensor.dims().iter().map(|d| *d as i64).collect();
        let data_type = self.data_type();
        let is_small = tensor.elem_count() * dtype.size_in_bytes() < SMALL;
        let definition = match &mut self.external {
            Some(external) if !is_small => external.write(name, data_type, &dims, |out| write_bytes(&tensor, out))?,
            _ => {
                let mut bytes = Vec::with_capacity(tensor.elem_count() * dtype.size_in_bytes());
                write_bytes(&tensor, &mut bytes).map_err(|e| convert(candle_core::Error::wrap(e)))?;
                TensorDef::inline(name, data_type, &dims, bytes)
            }
        };
        self.builder.initializer(definition);
        Ok(name.to_owned())
    }

    pub(super) fn finish(self) -> Result<Model> {
        if let Some(external) = self.external {
            external.finish()?;
        }
        Ok(self.builder.build()?)
    }
}
/// Writes a contiguous CPU tensor as little-endian bytes.
fn write_bytes(tensor: &Tensor, out: &mut dyn Write) -> std::io::Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + tensor.elem_count();
    let missing = || std::io::Error::other("the tensor is not a contiguous float tensor on the CPU");
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => write_values(v.get(range).ok_or_else(missing)?, |v| v.to_le_bytes(), out),
        Storage::Cpu(CpuStorage::F16(v)) => write_values(v.get(range).ok_or_else(missing)?, |v| v.to_le_bytes(), out),
        Storage::Cpu(CpuStorage::BF16(v)) => write_values(v.get(range).ok_or_else(missing)?, |v| v.to_le_bytes(), out),
        _ => Err(missing()),
    }
}

fn write_values<T: Copy, const N: usize>(
    values: &[T],
    bytes_of: impl Fn(T) -> [u8; N],
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(N << 14);
    for chunk in values.chunks(1 << 14) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|v| bytes_of(*v)));
        out.write_all(&buffer)?;
    }
    Ok(())
}
