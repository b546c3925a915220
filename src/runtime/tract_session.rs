//! tract, embedded.
//!
//! A plan is made once with symbolic dimensions when tract's analysis allows it and it runs; otherwise one plan per set of
//! input shapes, of which the last few are kept.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tract_onnx::pb::tensor_shape_proto::dimension::Value as DimValue;
use tract_onnx::pb::{ModelProto, TensorProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::{Framework, InferenceModelExt, IntoRunnable};
use tract_onnx::tract_hir::internal::*;

use super::guard::guarded;
use super::session::order_feeds;
use super::{DType, Dim, Error, Port, Result, RuntimeInfo, Session, Tensor as AnyTensor, Value};

const NAME: &str = "tract";

/// The version of tract that is built in: the one in Cargo.lock; a test holds them together.
pub const TRACT_VERSION: &str = "0.23.9";

type Plan = Arc<TypedRunnableModel>;
type Shapes = Vec<Vec<usize>>;

/// How a graph is loaded.
#[derive(Clone, Copy, Debug)]
pub struct TractOptions {
    /// Whether to try one plan for all shapes first.
    pub symbolic: bool,
    /// How many plans of concrete shapes to keep. Each holds its own packed copy of the weights.
    pub kept_plans: usize,
}

impl Default for TractOptions {
    fn default() -> Self {
        Self { symbolic: true, kept_plans: 4 }
    }
}

/// A graph in tract.
pub struct TractSession {
    path: PathBuf,
    /// Inputs with a default that are fed all the same.
    fed: Vec<String>,
    /// The plan's inputs, in its order.
    planned: Vec<Port>,
    inputs: Vec<Port>,
    /// Those of them that are this where they are not fed.
    optional: Vec<Port>,
    defaults: Vec<(String, TValue)>,
    outputs: Vec<Port>,
    plans: Plans,
    kept_plans: usize,
}

enum Plans {
    /// One plan for every shape.
    Symbolic(Plan),
    /// The parsed graph, and the latest plans with the shapes that they are for, oldest first.
    PerShape { model: Box<InferenceModel>, kept: VecDeque<(Shapes, Plan)> },
}

impl TractSession {
    /// Loads a graph; external data is looked for beside it.
    ///
    /// # Errors
    /// When the file cannot be read, or tract does not know an operator or element type of it.
    pub fn open(graph: &Path, options: TractOptions) -> Result<Self> {
        Self::open_fed(graph, &[], options)
    }

    /// As [`open`](Self::open), with inputs that may be fed although they have a default: to tract it is either an input or a
    /// constant.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_fed(graph: &Path, fed: &[String], options: TractOptions) -> Result<Self> {
        crate::files::open(graph)?;
        let Parsed { model, inputs: planned, outputs, defaults } =
            guarded(|| parse(graph, fed)).map_err(|reason| load_error(graph, reason))?;
        let symbolic = options.symbolic.then(|| guarded(|| symbolic_plan(model.clone(), &planned)));
        let plans = match symbolic {
            Some(Ok(plan)) => Plans::Symbolic(plan),
            None => Plans::per_shape(model),
            Some(Err(reason)) => {
                tracing::debug!(graph = %graph.display(), reason, "tract cannot plan with symbolic dimensions");
                Plans::per_shape(model)
            }
        };
        let defaults = defaults.into_iter().map(|(name, value)| Ok((name, from_value(value)?)));
        let defaults = defaults.collect::<Result<Vec<_>>>()?;
        let has_default = |port: &Port| defaults.iter().any(|(name, _)| *name == port.name);
        let (optional, inputs) = planned.iter().cloned().partition(has_default);
        let (path, fed, kept_plans) = (graph.into(), fed.into(), options.kept_plans.max(1));
        Ok(Self { path, fed, planned, inputs, optional, defaults, outputs, plans, kept_plans })
    }

    fn run_plan(&mut self, feeds: TVec<TValue>) -> Result<TVec<TValue>> {
        if let Plans::Symbolic(plan) = &self.plans {
            let again = feeds.clone();
            let reason = match guarded(|| plan.run(again)) {
                Ok(outputs) if outputs.iter().all(is_settled) => return Ok(outputs),
                Ok(_) => "an output holds symbols".to_owned(),
                Err(reason) => reason,
            };
            // An exporter's dimension names can contradict what the nodes compute, which shows only here.
            tracing::debug!(graph = %self.path.display(), reason, "tract's symbolic plan does not run");
            let Parsed { model, .. } =
                guarded(|| parse(&self.path, &self.fed)).map_err(|reason| load_error(&self.path, reason))?;
            self.plans = Plans::per_shape(model);
        }
        let plan = self.plan_for(feeds.iter().map(|value| value.shape().into()).collect())?;
        guarded(|| plan.run(feeds)).map_err(|reason| Error::Run { runtime: NAME, reason })
    }

    fn plan_for(&mut self, shapes: Shapes) -> Result<Plan> {
        let (model, kept) = match &mut self.plans {
            Plans::Symbolic(plan) => return Ok(plan.clone()),
            Plans::PerShape { model, kept } => (model, kept),
        };
        if let Some(entry) = kept.iter().position(|(known, _)| *known == shapes).and_then(|index| kept.remove(index)) {
            let plan = entry.1.clone();
            kept.push_back(entry);
            return Ok(plan);
        }
        // The oldest plan goes before the new one is made, so that there is never one copy of the weights too many.
        while kept.len() >= self.kept_plans {
            kept.pop_front();
        }
        let plan = guarded(|| concrete_plan((**model).clone(), &shapes));
        let plan = plan.map_err(|reason| load_error(&self.path, reason))?;
        kept.push_back((shapes, plan.clone()));
        Ok(plan)
    }
}

/// Whether a value is of numbers: dimensions that reach an output may be symbols.
fn is_settled(value: &TValue) -> bool {
    value.datum_type() != TDim::datum_type() || value.cast_to::<i64>().is_ok()
}

impl Plans {
    fn per_shape(model: InferenceModel) -> Self {
        Self::PerShape { model: Box::new(model), kept: VecDeque::new() }
    }
}

fn load_error(graph: &Path, reason: String) -> Error {
    Error::Load { runtime: NAME, path: graph.into(), reason }
}

impl Session for TractSession {
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
        let optimization = match self.plans {
            Plans::Symbolic(_) => "optimized, one symbolic plan",
            Plans::PerShape { .. } => "optimized, one plan per shape",
        };
        RuntimeInfo {
            runtime: NAME.into(),
            version: TRACT_VERSION.into(),
            device: "cpu".into(),
            optimization: optimization.into(),
            library: None,
        }
    }

    fn run_tensors(&mut self, mut feeds: Vec<(String, AnyTensor)>) -> Result<Vec<(String, AnyTensor)>> {
        for (name, value) in &self.defaults {
            if feeds.iter().all(|(fed, _)| fed != name) {
                feeds.push((name.clone(), AnyTensor::tract(value.clone())));
            }
        }
        let feeds = order_feeds(&self.planned, &[], feeds)?;
        let feeds = feeds.into_iter().map(|(_, tensor)| tensor.into_tract()).collect::<Result<TVec<TValue>>>()?;
        let outputs = self.run_plan(feeds)?;
        let names = self.outputs.iter().map(|port| port.name.clone());
        Ok(names.zip(outputs.into_iter().map(AnyTensor::tract)).collect())
    }

    fn hold(&self, value: Value) -> Result<AnyTensor> {
        from_value(value).map(AnyTensor::tract)
    }
}

/// A graph as tract reads it.
struct Parsed {
    model: InferenceModel,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Of the inputs that are no constants though they have a default.
    defaults: Vec<(String, Value)>,
}

fn parse(graph: &Path, fed: &[String]) -> TractResult<Parsed> {
    // Declared output and inner shapes name dimensions in the exporter's way, which tract cannot unify with what it
    // finds itself.
    let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
    let mut proto = onnx.proto_model_for_path(graph)?;
    let mut defaults = Vec::new();
    if let Some(graph) = &mut proto.graph {
        let of_fed = graph.initializer.extract_if(.., |tensor| fed.contains(&tensor.name));
        defaults.extend(of_fed.filter_map(|tensor| default(&tensor)));
    }
    let (inputs, outputs) = ports(&proto)?;
    let folder = graph.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    let folder = folder.map(|folder| folder.to_str().context("the folder's name is not UTF-8")).transpose()?;
    let parsed = onnx.parse(&proto, folder)?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        bail!("a node reads `{name}`, which nothing produces");
    }
    Ok(Parsed { model: parsed.model, inputs, outputs, defaults })
}

/// The name and value of an initializer that is written into the file.
fn default(tensor: &TensorProto) -> Option<(String, Value)> {
    let shape = tensor.dims.iter().map(|dim| usize::try_from(*dim).ok()).collect::<Option<Vec<_>>>()?;
    let value = Value::from_le_bytes(DType::from_onnx(tensor.data_type)?, &shape, &tensor.raw_data).ok()?;
    Some((tensor.name.clone(), value))
}

fn ports(proto: &ModelProto) -> TractResult<(Vec<Port>, Vec<Port>)> {
    let graph = proto.graph.as_ref().context("the file holds no graph")?;
    // An initializer of the same name makes an input a constant.
    let is_fed = |info: &&ValueInfoProto| graph.initializer.iter().all(|tensor| tensor.name != info.name);
    let inputs: Vec<&ValueInfoProto> = graph.input.iter().filter(is_fed).collect();
    let has_shape = |info: &ValueInfoProto| {
        let kind = info.r#type.as_ref().and_then(|kind| kind.value.as_ref());
        matches!(kind, Some(type_proto::Value::TensorType(tensor)) if tensor.shape.is_some())
    };
    if let Some(info) = inputs.iter().find(|info| !has_shape(info)) {
        bail!("`{}` is no tensor of a declared shape", info.name);
    }
    let inputs = inputs.into_iter().map(port).collect::<TractResult<_>>()?;
    Ok((inputs, graph.output.iter().map(port).collect::<TractResult<_>>()?))
}

fn port(info: &ValueInfoProto) -> TractResult<Port> {
    let kind = info.r#type.as_ref().and_then(|kind| kind.value.as_ref());
    let Some(type_proto::Value::TensorType(tensor)) = kind else { bail!("`{}` is not a tensor", info.name) };
    let dtype = DType::from_onnx(tensor.elem_type);
    let dtype = dtype.with_context(|| format!("`{}` has elements of ONNX type {}", info.name, tensor.elem_type))?;
    // an output may be of any rank
    let dims = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| match &dim.value {
        Some(DimValue::DimValue(size)) => usize::try_from(*size).map_or(Dim::Unknown, Dim::Fixed),
        Some(DimValue::DimParam(name)) if !name.is_empty() => Dim::Named(name.clone()),
        _ => Dim::Unknown,
    });
    Ok(Port { name: info.name.clone(), dtype, dims: dims.collect() })
}

fn symbolic_plan(mut model: InferenceModel, inputs: &[Port]) -> TractResult<Plan> {
    name_total_length(&mut model, inputs)?;
    for symbol in model.symbols.all_symbols() {
        model.symbols.add_assertion(format!("{symbol} >= 0"))?;
    }
    model.into_optimized()?.into_runnable()
}

/// Makes the mask's own length the sum of past and sequence, which an exporter that gives it a name of its own
/// (`total_sequence_length`) leaves unsaid.
fn name_total_length(model: &mut InferenceModel, inputs: &[Port]) -> TractResult<()> {
    let dim = |name: &str, axis: usize| {
        let index = inputs.iter().position(|port| port.name == name)?;
        let dim = model.input_fact(index).ok()?.shape.dims().nth(axis)?.concretize()?;
        Some((index, dim))
    };
    let (Some((_, sequence)), Some((mask, _))) = (dim("input_ids", 1), dim("attention_mask", 1)) else {
        return Ok(());
    };
    let past = inputs.iter().find(|port| port.name.starts_with("past_key_values."));
    let Some((_, past)) = past.and_then(|port| dim(&port.name, 2)) else { return Ok(()) };
    let batch = model.input_fact(mask)?.shape.dims().next().and_then(|dim| dim.concretize());
    let Some(batch) = batch else { return Ok(()) };
    let fact = InferenceFact::dt_shape(i64::datum_type(), tvec![batch, past + sequence]);
    model.set_input_fact(mask, fact)
}

fn concrete_plan(mut model: InferenceModel, shapes: &Shapes) -> TractResult<Plan> {
    for (index, shape) in shapes.iter().enumerate() {
        let dtype = model.input_fact(index)?.datum_type.concretize().context("an input without element type")?;
        model.set_input_fact(index, InferenceFact::dt_shape(dtype, shape))?;
    }
    model.into_optimized()?.into_runnable()
}

pub(super) fn dtype(found: DatumType) -> Result<DType> {
    Ok(match found {
        DatumType::F64 => DType::F64,
        DatumType::F32 => DType::F32,
        DatumType::F16 => DType::F16,
        DatumType::I64 => DType::I64,
        DatumType::I32 => DType::I32,
        DatumType::I8 => DType::I8,
        DatumType::U8 => DType::U8,
        DatumType::Bool => DType::Bool,
        // Shape arithmetic that reaches an output is a matter of tract's own; to the caller it is int64.
        DatumType::TDim => DType::I64,
        other => return Err(Error::Run { runtime: NAME, reason: format!("it made {other:?} elements") }),
    })
}

pub(super) fn to_value(tensor: &Tensor) -> Result<Value> {
    fn copy<T: Datum>(tensor: &Tensor) -> TractResult<Value>
    where
        ndarray::ArrayD<T>: Into<Value>,
    {
        Ok(tensor.cast_to::<T>()?.to_plain_array_view::<T>()?.to_owned().into())
    }
    let value = match dtype(tensor.datum_type())? {
        DType::F64 => copy::<f64>(tensor),
        DType::F32 => copy::<f32>(tensor),
        DType::F16 => copy::<f16>(tensor),
        DType::I64 => copy::<i64>(tensor),
        DType::I32 => copy::<i32>(tensor),
        DType::I8 => copy::<i8>(tensor),
        DType::U8 => copy::<u8>(tensor),
        DType::Bool => copy::<bool>(tensor),
        DType::Bf16 => return Err(no_bf16()),
    };
    value.map_err(|error| Error::Run { runtime: NAME, reason: format!("{error:#}") })
}

pub(super) fn from_value(value: Value) -> Result<TValue> {
    Ok(match value {
        Value::F64(array) => array.into_tensor().into(),
        Value::F32(array) => array.into_tensor().into(),
        Value::F16(array) => array.into_tensor().into(),
        Value::I64(array) => array.into_tensor().into(),
        Value::I32(array) => array.into_tensor().into(),
        Value::I8(array) => array.into_tensor().into(),
        Value::U8(array) => array.into_tensor().into(),
        Value::Bool(array) => array.into_tensor().into(),
        Value::Bf16(_) => return Err(no_bf16()),
    })
}

fn no_bf16() -> Error {
    Error::Run { runtime: NAME, reason: "it has no bf16 elements".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing::{self, TinyModel};

    #[test]
    fn runs_a_graph_with_and_without_external_data() {
        let folder = tempfile::tempdir().unwrap();
        for external in [false, true] {
            let graph = TinyModel { cached: false, external }.write(folder.path());
            for symbolic in [true, false] {
                let options = TractOptions { symbolic, ..Default::default() };
                let mut session = TractSession::open(&graph, options).unwrap();
                assert_eq!(session.info().optimization.contains("symbolic"), symbolic);
                testing::check_tiny(&mut session);
            }
        }
    }

    #[test]
    fn plans_are_kept_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        let mut session = TractSession::open(&graph, TractOptions { symbolic: false, kept_plans: 2 }).unwrap();
        let kept = |session: &TractSession| match &session.plans {
            Plans::PerShape { kept, .. } => kept.iter().map(|(shapes, _)| shapes[0][1]).collect::<Vec<_>>(),
            Plans::Symbolic(_) => panic!("the plan is symbolic"),
        };
        for length in [1, 2, 1, 3] {
            session.run(testing::tiny_feeds(1, length)).unwrap();
        }
        assert_eq!(kept(&session), [1, 3]);
    }

    /// This exporter names a dimension of the mask that the nodes then compute otherwise.
    #[test]
    fn a_symbolic_plan_that_does_not_run_gives_way() {
        let Some(graph) = testing::shared("graphs/torch_dynamo18/llama_gqa/model.onnx") else { return };
        let mut session = TractSession::open(&graph, TractOptions::default()).unwrap();
        assert!(matches!(session.plans, Plans::Symbolic(_)));
        let positions = ndarray::arr2(&[[0i64, 1, 2]]).into_dyn();
        session.run(testing::tiny_feeds(1, 3).with("position_ids", positions)).unwrap();
        assert!(matches!(session.plans, Plans::PerShape { .. }));
    }

    #[test]
    fn what_cannot_be_loaded_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path| TractSession::open(path, TractOptions::default()).err().unwrap();
        assert!(matches!(open(&folder.path().join("absent.onnx")), Error::Files(_)));
        let graph = TinyModel { cached: false, external: true }.write(folder.path());
        let bytes = std::fs::read(&graph).unwrap();
        std::fs::remove_file(folder.path().join(testing::DATA_NAME)).unwrap();
        assert!(matches!(open(&graph), Error::Load { .. }), "external data missing");
        for len in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&graph, &bytes[..len]).unwrap();
            assert!(matches!(open(&graph), Error::Load { .. }), "{len} bytes");
        }
    }

    #[test]
    fn the_stated_version_is_the_locked_one() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap();
        assert!(lock.contains(&format!("name = \"tract-onnx\"\nversion = \"{TRACT_VERSION}\"")));
    }
}
