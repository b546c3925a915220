//! A graph under construction, with its weights on their way to disk.

use std::io::Write;
use std::path::Path;

use candle_core::{CpuStorage, Storage, Tensor};

use super::{DATA_NAME, Error, ExportOptions, Result, new_builder};
use crate::base::{Checkpoint, DecoderSpec, WeightRole};
use crate::onnx::{DataType, Dim, ExternalWriter, FunctionDef, Model, ModelBuilder, NodeDef, TensorDef, ValueDef};

/// Tensors of fewer bytes stay inline even where the weights are external: shapes, norms, constants.
const SMALL: usize = 1024;

/// Collects nodes and weights of one decoder.
pub(super) struct GraphWriter<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a ExportOptions,
    builder: ModelBuilder,
    external: Option<ExternalWriter>,
}

impl<'a> GraphWriter<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, options: &'a ExportOptions, folder: &Path) -> Result<Self> {
        let bytes = (checkpoint.spec().num_parameters() * options.precision.dtype().size_in_bytes()) as u64;
        let external = if bytes > options.external_data_threshold {
            Some(ExternalWriter::create(folder, DATA_NAME)?)
        } else {
            None
        };
        Ok(Self { checkpoint, options, builder: new_builder(options.dialect), external })
    }

    pub(super) fn spec(&self) -> &'a DecoderSpec {
        self.checkpoint.spec()
    }

    /// The type of weights and activations.
    pub(super) fn data_type(&self) -> DataType {
        self.options.precision.data_type()
    }

    pub(super) fn input(&mut self, name: &str, data_type: DataType, dims: impl IntoIterator<Item = Dim>) {
        self.builder.input(ValueDef::new(name, data_type, dims));
    }

    pub(super) fn output(&mut self, name: &str, data_type: DataType, dims: impl IntoIterator<Item = Dim>) {
        self.builder.output(ValueDef::new(name, data_type, dims));
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

    /// A shape or list of axes as an initializer.
    pub(super) fn integers(&mut self, name: &str, values: &[i64]) -> String {
        self.builder.initializer(TensorDef::from_i64s(name, &[values.len() as i64], values));
        name.to_owned()
    }

    /// One integer without dimensions.
    pub(super) fn integer(&mut self, name: &str, value: i64) -> String {
        self.builder.initializer(TensorDef::from_i64s(name, &[], &[value]));
        name.to_owned()
    }

    /// A float32 constant.
    pub(super) fn floats(&mut self, name: &str, dims: &[i64], values: &[f32]) -> String {
        self.builder.initializer(TensorDef::from_f32s(name, dims, values));
        name.to_owned()
    }

    /// One number in the graph's type.
    pub(super) fn number(&mut self, name: &str, value: f64) -> Result<String> {
        let tensor = Tensor::new(value, &candle_core::Device::Cpu);
        self.tensor(name, tensor)
    }

    /// Rows of `width` numbers in the graph's type.
    pub(super) fn table(&mut self, name: &str, values: Vec<f64>, width: usize) -> Result<String> {
        let rows = values.len() / width.max(1);
        self.tensor(name, Tensor::from_vec(values, (rows, width), &candle_core::Device::Cpu))
    }

    /// A checkpoint's weight as it stands there.
    pub(super) fn weight(&mut self, role: WeightRole) -> Result<String> {
        let name = role.name();
        let tensor = self.checkpoint.weight(role)?;
        self.tensor(&name, Ok(tensor))
    }

    /// A checkpoint's `[out, in]` matrix as the `[in, out]` right-hand side of a MatMul.
    pub(super) fn transposed_weight(&mut self, role: WeightRole) -> Result<String> {
        let name = role.name();
        let tensor = self.checkpoint.weight(role)?;
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        self.tensor(&format!("{stem}.MatMul.weight"), tensor.t())
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
