//! ONNX Runtime, through `ort`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ort::ep::{CUDA, TensorRT};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{Adapter, RunOptions, Session as InnerSession, SessionInputValue};
use ort::value::{
    DynTensorValueType, DynValue, Outlet, PrimitiveTensorElementType, Tensor as OrtTensor, TensorElementType, ValueType,
};
use serde::{Deserialize, Serialize};

use super::guard::guarded;
use super::profile::Profile;
use super::session::order_feeds;
use super::{DType, Dim, Error, Port, Result, RuntimeInfo, Session, Tensor, Value, library};

const NAME: &str = "ONNX Runtime";

/// How much ONNX Runtime rewrites a graph before it runs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimization {
    /// The graph as it is written.
    Off,
    /// Rewrites that keep the meaning exactly: constant folding, removal of redundant nodes.
    Basic,
    /// Everything, fused operators included, which may reorder floating-point operations.
    #[default]
    All,
}

/// What runs the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The CPU.
    #[default]
    Cpu,
    /// CUDA.
    Cuda,
    /// TensorRT, and CUDA for what it leaves.
    TensorRt,
}

/// How a graph is loaded.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OrtOptions {
    /// Graph optimisation.
    pub optimization: Optimization,
    /// Threads inside one operator; none means one per core.
    pub threads: Option<usize>,
    /// The execution provider. One that the library lacks is an error, not a run on the CPU.
    pub provider: Provider,
    /// Whether float32 products on a GPU may be rounded to TF32.
    pub tf32: bool,
    /// Whether nodes that another provider does not take may run on the CPU.
    pub cpu_fallback: bool,
    /// Whether the first run is profiled, for [`Session::nodes`].
    pub profile: bool,
}

impl Optimization {
    /// `off`, `basic` or `all`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Basic => "basic",
            Self::All => "all",
        }
    }
}

impl Provider {
    /// `cpu`, `cuda` or `tensorrt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        }
    }
}

/// A graph in ONNX Runtime.
#[derive(Debug)]
pub struct OrtSession {
    inner: InnerSession,
    inputs: Vec<Port>,
    optional: Vec<Port>,
    outputs: Vec<Port>,
    /// The adapter that is active, in the options of a run.
    adapter: Option<Active>,
    library: PathBuf,
    options: OrtOptions,
    /// The profile of the first run, which ends it.
    profile: Option<Profile>,
    nodes: Option<BTreeMap<String, usize>>,
}

struct Active(RunOptions);

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Active")
    }
}

impl OrtSession {
    /// Loads a graph with the library at `library` (see [`library::find`]); external data is looked for beside the graph.
    ///
    /// # Errors
    /// When the library cannot be loaded or another one is, or ONNX Runtime refuses the graph.
    pub fn open(library: &Path, graph: &Path, options: OrtOptions) -> Result<Self> {
        let environment = library::load(library)?;
        crate::files::open(graph)?;
        let profile = options.profile.then(Profile::new).transpose()?;
        let refused = |reason: String| Error::Load { runtime: NAME, path: graph.into(), reason };
        let missing = |reason: String| Error::Provider { provider: options.provider.name(), reason };
        load_needs(library, options.provider).map_err(missing)?;
        let builder = guarded(|| with_provider(SessionBuilder::new(&environment)?, options)).map_err(missing)?;
        let open = || configure(builder, options, profile.as_ref())?.commit_from_file(graph);
        let inner = guarded(open).map_err(refused)?;
        let ports = |outlets: &[Outlet]| outlets.iter().map(port).collect::<Result<Vec<_>>>();
        let inputs = ports(inner.inputs())?;
        let outputs = ports(inner.outputs())?;
        let optional = inner.overridable_initializers();
        let optional = optional.iter().map(|default| port_of(default.name(), default.dtype()));
        let optional = optional.collect::<Result<Vec<_>>>()?;
        let library = library.into();
        Ok(Self { inner, inputs, optional, outputs, adapter: None, library, options, profile, nodes: None })
    }

    /// Makes the values of an `.onnx_adapter` file those of the graph's slots from the next run on, through ONNX Runtime's
    /// adapter API; none for the graph's own defaults.
    ///
    /// # Errors
    /// When ONNX Runtime does not read the file. That its values fit the graph shows at the run.
    pub fn set_adapter(&mut self, file: Option<&Path>) -> Result<()> {
        let active = |file: &Path| -> Result<Active> {
            let refused = |reason: String| Error::Load { runtime: NAME, path: file.into(), reason };
            let mut options = RunOptions::new().map_err(run_error)?;
            guarded(|| options.add_adapter(&Adapter::from_file(file, None)?)).map_err(refused)?;
            Ok(Active(options))
        };
        self.adapter = file.map(active).transpose()?;
        Ok(())
    }

    /// Runs with outputs that stay in a device's memory until they are read: a cache goes from step to step without a copy.
    fn run_on(
        &mut self,
        device: AllocationDevice<'static>,
        feeds: Vec<(String, Tensor)>,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut binding = self.inner.create_binding().map_err(run_error)?;
        for (name, tensor) in feeds {
            let value = tensor.into_ort()?;
            binding.bind_input(name, &*value).map_err(run_error)?;
        }
        let memory = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default);
        let memory = memory.map_err(run_error)?;
        for port in &self.outputs {
            binding.bind_output_to_device(port.name.as_str(), &memory).map_err(run_error)?;
        }
        let outputs = match &self.adapter {
            Some(Active(options)) => self.inner.run_binding_with_options(&binding, options),
            None => self.inner.run_binding(&binding),
        };
        let outputs = outputs.map_err(run_error)?;
        Ok(outputs.into_iter().map(|(name, value)| (name.to_owned(), Tensor::ort(value))).collect())
    }

    /// Ends the profile, after the first run.
    fn end_profile(&mut self) -> Result<()> {
        let Some(profile) = self.profile.take() else { return Ok(()) };
        let path = self.inner.end_profiling().map_err(run_error)?;
        self.nodes = Some(profile.nodes(Path::new(&path))?);
        Ok(())
    }
}

/// Loads the libraries that the provider's own one needs, which lie in many places.
fn load_needs(library: &Path, provider: Provider) -> std::result::Result<(), String> {
    let Some(own) = library::provider_library(library, provider) else {
        return if provider == Provider::Cpu { Ok(()) } else { Err("its library is not beside the main one".into()) };
    };
    let missing = crate::files::load_needs(&own);
    if missing.is_empty() {
        return Ok(());
    }
    let driver = if missing.iter().any(|name| name == "libcuda.so.1") {
        "; libcuda.so.1 is the NVIDIA driver's: without it there is no GPU"
    } else {
        ""
    };
    Err(format!("{} cannot be loaded{driver}", missing.join(", ")))
}

/// Asks for the execution provider, which fails where the library lacks it.
fn with_provider(builder: SessionBuilder, options: OrtOptions) -> ort::Result<SessionBuilder> {
    let cuda = || CUDA::default().with_tf32(options.tf32).build().error_on_failure();
    let providers = match options.provider {
        Provider::Cpu => return Ok(builder),
        Provider::Cuda => vec![cuda()],
        Provider::TensorRt => vec![TensorRT::default().build().error_on_failure(), cuda()],
    };
    let builder = builder.with_execution_providers(providers)?;
    if options.cpu_fallback { Ok(builder) } else { Ok(builder.with_disable_cpu_fallback()?) }
}

fn configure(
    mut builder: SessionBuilder,
    options: OrtOptions,
    profile: Option<&Profile>,
) -> ort::Result<SessionBuilder> {
    if let Some(profile) = profile {
        builder = builder.with_profiling(profile.prefix())?;
    }
    let level = match options.optimization {
        Optimization::Off => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let builder = builder.with_optimization_level(level)?.with_deterministic_compute(true)?;
    match options.threads {
        Some(threads) => Ok(builder.with_intra_threads(threads)?),
        None => Ok(builder),
    }
}

fn run_error(error: ort::Error) -> Error {
    Error::Run { runtime: NAME, reason: error.to_string() }
}

impl Session for OrtSession {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn optional_inputs(&self) -> &[Port] {
        &self.optional
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn info(&self) -> RuntimeInfo {
        RuntimeInfo {
            runtime: "onnxruntime".into(),
            version: library::version_of(&self.library).unwrap_or_else(|| ort::info().into()),
            device: self.options.provider.name().into(),
            optimization: self.options.optimization.name().into(),
            library: Some(self.library.clone()),
        }
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let feeds = order_feeds(&self.inputs, &self.optional, feeds)?;
        if self.options.provider != Provider::Cpu {
            let outputs = self.run_on(AllocationDevice::CUDA, feeds);
            self.end_profile()?;
            return outputs;
        }
        let feeds = feeds.into_iter().map(|(name, tensor)| Ok((name, tensor.into_ort()?)));
        let feeds = feeds.collect::<Result<Vec<_>>>()?;
        let feeds: Vec<_> = feeds.iter().map(|(name, value)| (name, SessionInputValue::from(&**value))).collect();
        let outputs = match &self.adapter {
            Some(Active(options)) => self.inner.run_with_options(feeds, options),
            None => self.inner.run(feeds),
        };
        let outputs = outputs.map_err(run_error)?;
        let outputs = outputs.into_iter().map(|(name, value)| (name.to_owned(), Tensor::ort(value))).collect();
        self.end_profile()?;
        Ok(outputs)
    }

    fn hold(&self, value: Value) -> Result<Tensor> {
        from_value(value).map(Tensor::ort)
    }

    fn nodes(&self) -> Option<BTreeMap<String, usize>> {
        self.nodes.clone()
    }
}

fn port(outlet: &Outlet) -> Result<Port> {
    port_of(outlet.name(), outlet.dtype())
}

fn port_of(name: &str, found: &ValueType) -> Result<Port> {
    let ValueType::Tensor { shape, dimension_symbols, .. } = found else {
        return Err(unsupported(found));
    };
    let symbols = dimension_symbols.iter().map(String::as_str).chain(std::iter::repeat(""));
    let dims = shape.iter().zip(symbols).map(|(size, symbol)| match (usize::try_from(*size), symbol) {
        (Ok(size), _) => Dim::Fixed(size),
        (Err(_), "") => Dim::Unknown,
        (Err(_), name) => Dim::Named(name.into()),
    });
    Ok(Port { name: name.into(), dtype: dtype(found)?, dims: dims.collect() })
}

fn unsupported(found: &ValueType) -> Error {
    Error::Feed { reason: format!("an input or output is a {found}, which prefold does not read") }
}

pub(super) fn dtype(found: &ValueType) -> Result<DType> {
    let ValueType::Tensor { ty, .. } = found else { return Err(unsupported(found)) };
    Ok(match ty {
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Bool => DType::Bool,
        _ => return Err(unsupported(found)),
    })
}

pub(super) fn shape(found: &ValueType) -> Vec<usize> {
    let ValueType::Tensor { shape, .. } = found else { return Vec::new() };
    shape.iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect()
}

pub(super) fn to_value(value: &DynValue) -> Result<Value> {
    let tensor = value.view().downcast::<DynTensorValueType>().map_err(run_error)?;
    if !tensor.memory_info().is_cpu_accessible() {
        let copy = tensor.to(AllocationDevice::CPU, 0).map_err(run_error)?;
        return to_value(&copy.into_dyn());
    }
    drop(tensor);
    fn copy<T: PrimitiveTensorElementType + Clone>(value: &DynValue) -> Result<Value>
    where
        ndarray::ArrayD<T>: Into<Value>,
    {
        Ok(value.try_extract_array::<T>().map_err(run_error)?.to_owned().into())
    }
    match dtype(value.dtype())? {
        DType::F64 => copy::<f64>(value),
        DType::F32 => copy::<f32>(value),
        DType::F16 => copy::<half::f16>(value),
        DType::Bf16 => copy::<half::bf16>(value),
        DType::I64 => copy::<i64>(value),
        DType::I32 => copy::<i32>(value),
        DType::I8 => copy::<i8>(value),
        DType::U8 => copy::<u8>(value),
        DType::Bool => copy::<bool>(value),
    }
}

/// Hands the array's own memory to ONNX Runtime, without a copy when it is row-major.
pub(super) fn from_value(value: Value) -> Result<DynValue> {
    let value = match value {
        Value::F64(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::F32(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::F16(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::Bf16(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::I64(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::I32(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::I8(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::U8(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
        Value::Bool(array) => OrtTensor::from_array(array).map(OrtTensor::into_dyn),
    };
    value.map_err(run_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing::{self, TinyModel};

    #[test]
    fn runs_a_graph_with_and_without_external_data() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        for external in [false, true] {
            let graph = TinyModel { cached: false, external }.write(folder.path());
            let mut session = OrtSession::open(&library, &graph, OrtOptions::default()).unwrap();
            testing::check_tiny(&mut session);
            assert_eq!(session.info().runtime, "onnxruntime");
        }
    }

    #[test]
    fn a_held_tensor_is_fed_again_without_a_copy() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        let session = OrtSession::open(&library, &graph, OrtOptions::default()).unwrap();
        let value = Value::zeros(DType::F32, &[2, 3]).unwrap();
        let held = session.hold(value.clone()).unwrap();
        let again = || held.again().unwrap();
        assert!(std::sync::Arc::ptr_eq(&again().into_ort().unwrap(), &again().into_ort().unwrap()));
        assert_eq!(again().into_value().unwrap(), value);
    }

    /// The decode loop of a GPU, with the CPU in its place: outputs are bound, and go into the next step as they lie.
    #[test]
    fn bound_outputs_are_those_of_a_plain_run_from_step_to_step() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: true, external: false }.write(folder.path());
        let open = || OrtSession::open(&library, &graph, OrtOptions::default()).unwrap();
        let (mut plain, mut bound) = (open(), open());
        let past = || Tensor::from(Value::zeros(DType::F32, &[1, 1, 0, 1]).unwrap());
        let (mut of_plain, mut of_bound) = ((past(), past()), (past(), past()));
        for step in 0..3 {
            let feeds = |(key, value): (Tensor, Tensor)| {
                let ids = |values: Vec<i64>| {
                    Tensor::from(Value::I64(
                        ndarray::Array2::from_shape_vec((1, values.len()), values).unwrap().into_dyn(),
                    ))
                };
                vec![
                    ("input_ids".to_owned(), ids(vec![step + 1])),
                    ("attention_mask".to_owned(), ids(vec![1; step as usize + 1])),
                    ("past_key_values.0.key".to_owned(), key),
                    ("past_key_values.0.value".to_owned(), value),
                ]
            };
            let outputs = plain.run_tensors(feeds(of_plain)).unwrap();
            let bound_feeds = order_feeds(&bound.inputs, &bound.optional, feeds(of_bound)).unwrap();
            let bound_outputs = bound.run_on(AllocationDevice::CPU, bound_feeds).unwrap();
            let taken = |outputs: Vec<(String, Tensor)>| {
                let mut of = outputs.into_iter().collect::<BTreeMap<_, _>>();
                let mut take = |name: &str| of.remove(name).unwrap();
                (take("logits").into_value().unwrap(), (take("present.0.key"), take("present.0.value")))
            };
            let ((logits, cache), (bound_logits, bound_cache)) = (taken(outputs), taken(bound_outputs));
            assert_eq!(logits, bound_logits, "step {step}");
            (of_plain, of_bound) = (cache, bound_cache);
        }
    }

    #[test]
    fn every_optimisation_level_and_thread_count_gives_the_same() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        for optimization in [Optimization::Off, Optimization::Basic, Optimization::All] {
            let options = OrtOptions { optimization, threads: Some(1), ..OrtOptions::default() };
            testing::check_tiny(&mut OrtSession::open(&library, &graph, options).unwrap());
        }
    }

    /// The tiny graph is one node, which the optimiser leaves as it is.
    #[test]
    fn the_profile_tells_where_nodes_ran() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        let options = OrtOptions { profile: true, ..OrtOptions::default() };
        let mut session = OrtSession::open(&library, &graph, options).unwrap();
        assert_eq!(session.nodes(), None, "nothing has run");
        testing::check_tiny(&mut session);
        assert_eq!(session.nodes(), Some(BTreeMap::from([("CPUExecutionProvider".to_owned(), 1)])));
    }

    /// The library of the tests knows the CPU alone. A run there in the place of a GPU would be a silent one.
    #[test]
    fn a_provider_that_is_not_there_is_no_run_on_the_cpu() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        for provider in [Provider::Cuda, Provider::TensorRt] {
            let options = OrtOptions { provider, cpu_fallback: true, ..OrtOptions::default() };
            let error = OrtSession::open(&library, &graph, options).unwrap_err();
            assert!(matches!(error, Error::Provider { .. }) && error.is_unavailable(), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_loaded_is_an_error() {
        let Some(library) = testing::ort_library() else { return };
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path| OrtSession::open(&library, path, OrtOptions::default()).unwrap_err();
        assert!(matches!(open(&folder.path().join("absent.onnx")), Error::Files(_)));
        let graph = TinyModel { cached: false, external: true }.write(folder.path());
        let bytes = std::fs::read(&graph).unwrap();
        std::fs::remove_file(folder.path().join(testing::DATA_NAME)).unwrap();
        assert!(matches!(open(&graph), Error::Load { .. }), "external data missing");
        std::fs::write(&graph, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(open(&graph), Error::Load { .. }), "truncated");
    }

    #[test]
    fn a_second_library_is_refused() {
        let Some(library) = testing::ort_library() else { return };
        library::load(&library).unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(library::load(other.path()), Err(Error::LibraryLoaded { .. })));
    }

    #[test]
    fn every_element_type_passes_through() {
        let Some(library) = testing::ort_library() else { return };
        library::load(&library).unwrap();
        for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16, DType::I64, DType::I32, DType::I8, DType::U8] {
            let value = Value::zeros(dtype, &[2, 3]).unwrap();
            let empty = Value::zeros(dtype, &[2, 0, 3]).unwrap();
            assert_eq!(to_value(&from_value(value.clone()).unwrap()).unwrap(), value);
            assert_eq!(to_value(&from_value(empty.clone()).unwrap()).unwrap(), empty);
        }
        let truth = Value::Bool(ndarray::arr1(&[true, false]).into_dyn());
        assert_eq!(to_value(&from_value(truth.clone()).unwrap()).unwrap(), truth);
    }
}
