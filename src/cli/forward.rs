//! `prefold forward`

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use clap::Args;
use miette::{IntoDiagnostic, Result};
use ndarray::Array2;

use super::active::Active;
use super::device::DeviceArgs;
use super::verify::{Engine, open_given};
use super::{Context, existing_graph, keep_apart, usage};
use crate::base::{Decoder, Input, NoHook, SiteHook};
use crate::runtime::{GraphDecoder, OrtOptions, positions};
use crate::train::{ComputeType, completion_loss};

/// Run a forward pass on given tokens, and write logits, loss and gradients
///
/// Reads `input_ids`, `attention_mask` and optionally `position_ids` and `labels` from a safetensors file, all of
/// [batch, seq]. Labels stand in the positions of `input_ids`, −100 where there is none, and are shifted inside; the loss is
/// the mean over labelled positions. Writes `logits` (float32); for --model also `loss` where there are labels, and with
/// --grad `grad.{tensor}` for every tensor of the adapter.
#[derive(Args, Debug)]
pub(super) struct Forward {
    /// Run this checkpoint in candle
    #[arg(long, required_unless_present = "graph", conflicts_with = "graph")]
    model: Option<String>,
    /// Run this graph in a runtime
    #[arg(long)]
    graph: Option<PathBuf>,
    /// With this adapter (--model only: a graph carries its own)
    #[arg(long, conflicts_with = "graph")]
    adapter: Option<PathBuf>,
    /// The safetensors file to read
    #[arg(long)]
    inputs: PathBuf,
    /// The safetensors file to write
    #[arg(long)]
    out: PathBuf,
    /// Also the gradient of every adapter tensor
    #[arg(long, requires = "adapter")]
    grad: bool,
    /// Type that candle computes in: f64, f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: ComputeType,
    #[command(flatten)]
    device: DeviceArgs,
    /// Runtime for --graph
    #[arg(long, default_value = "ort", value_enum)]
    runtime: Engine,
    #[command(flatten)]
    active: Active,
}

/// What the input file holds.
struct Given {
    batch: usize,
    seq: usize,
    ids: Vec<i64>,
    mask: Vec<i64>,
    positions: Option<Vec<i64>>,
    labels: Option<Vec<i64>>,
}

impl Forward {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.inputs])?;
        let given = read(&self.inputs)?;
        let outputs = match (&self.model, &self.graph) {
            (Some(model), _) => self.candle(context, model, &given)?,
            (None, Some(graph)) => self.graph(context, graph, &given)?,
            (None, None) => return Err(usage("neither --model nor --graph was given", "give one of them")),
        };
        write(&self.out, &outputs)?;
        println!("{}", self.out.display());
        Ok(ExitCode::SUCCESS)
    }

    fn candle(&self, context: &Context, model: &str, given: &Given) -> Result<HashMap<String, Tensor>> {
        let (checkpoint, adapter) = context.checkpoint_with(model, self.adapter.as_deref())?;
        let dtype = self.dtype.dtype();
        let device = self.device.open()?;
        let mut decoder = Decoder::load(&checkpoint, dtype, &device)?;
        let (adapter, vars) = match &adapter {
            // float64 gradients of a float64 model; float32 otherwise, as in training
            Some(adapter) => {
                let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                let (adapter, vars) = adapter.trainable(wide, &device)?;
                if self.grad
                    && let Some(own) = adapter.decoder(checkpoint.spec(), dtype)?
                {
                    decoder = own;
                }
                (Some(adapter), vars)
            }
            None => (None, std::collections::BTreeMap::new()),
        };
        let hook = adapter.map(|a| a.hook(checkpoint.spec(), &device)).transpose()?;
        let hook: &dyn SiteHook = hook.as_deref().unwrap_or(&NoHook);
        let input = Input::new(given.batch, &given.ids, &given.mask, given.positions.as_deref())?;
        let logits = decoder.forward(&input, None, hook)?.detach();
        let mut outputs = HashMap::from([("logits".to_owned(), logits.to_dtype(DType::F32).into_diagnostic()?)]);
        let Some(labels) = &given.labels else {
            if self.grad {
                let help = "add a tensor `labels` like input_ids, with -100 where nothing is predicted";
                return Err(usage(format!("--grad needs labels, and {} has none", self.inputs.display()), help));
            }
            return Ok(outputs);
        };
        let found = completion_loss(&decoder, hook, &input, labels)?;
        let mean = (&found.sum / found.tokens() as f64).into_diagnostic()?;
        if self.grad {
            let gradients = mean.backward().into_diagnostic()?;
            for (name, var) in &vars {
                let gradient = gradients.get(var).cloned().map_or_else(|| var.zeros_like(), Ok).into_diagnostic()?;
                outputs.insert(format!("grad.{name}"), gradient);
            }
        }
        let kept = if self.dtype == ComputeType::F64 { DType::F64 } else { DType::F32 };
        outputs.insert("loss".into(), mean.detach().to_dtype(kept).into_diagnostic()?);
        Ok(outputs)
    }

    fn graph(&self, context: &Context, graph: &Path, given: &Given) -> Result<HashMap<String, Tensor>> {
        let graph = existing_graph(graph)?;
        let session = open_given(context, self.runtime, &graph, self.active.given(&graph)?, OrtOptions::default())?;
        let mut decoder = GraphDecoder::new(session)?;
        let array =
            |values: &[i64]| Array2::from_shape_vec((given.batch, given.seq), values.to_vec()).into_diagnostic();
        let (ids, mask) = (array(&given.ids)?, array(&given.mask)?);
        let position_ids = match &given.positions {
            Some(values) => Some(array(values)?),
            None if decoder.ports().has_positions => Some(positions(&mask)),
            None => None,
        };
        let logits = decoder.extend(&ids, &mask, position_ids.as_ref())?;
        let shape = logits.dim();
        let logits =
            Tensor::from_vec(logits.into_iter().collect::<Vec<f32>>(), shape, &Device::Cpu).into_diagnostic()?;
        Ok(HashMap::from([("logits".to_owned(), logits)]))
    }
}

fn read(path: &Path) -> Result<Given> {
    let file = crate::files::MappedFile::open(path)?;
    let help = "it should hold integer tensors input_ids, attention_mask and optionally position_ids and labels";
    let fail = |why: String| usage(format!("{}: {why}", path.display()), help);
    let tensors = candle_core::safetensors::load_buffer(file.bytes(), &Device::Cpu).map_err(|e| fail(e.to_string()))?;
    let integers = |name: &str| -> Result<Option<(Vec<usize>, Vec<i64>)>> {
        let Some(tensor) = tensors.get(name) else { return Ok(None) };
        let values = tensor.to_dtype(DType::I64).and_then(|t| t.flatten_all()?.to_vec1::<i64>());
        Ok(Some((tensor.dims().to_vec(), values.map_err(|e| fail(format!("`{name}`: {e}")))?)))
    };
    let Some((shape, ids)) = integers("input_ids")? else { return Err(fail("there is no tensor `input_ids`".into())) };
    let [batch, seq] = shape[..] else { return Err(fail(format!("input_ids has shape {shape:?}, not [batch, seq]"))) };
    let same_shape = |name: &str| -> Result<Option<Vec<i64>>> {
        match integers(name)? {
            Some((found, _)) if found != shape => Err(fail(format!("{name} has shape {found:?}, input_ids {shape:?}"))),
            Some((_, values)) => Ok(Some(values)),
            None => Ok(None),
        }
    };
    let mask = same_shape("attention_mask")?.unwrap_or_else(|| vec![1; ids.len()]);
    Ok(Given { batch, seq, mask, positions: same_shape("position_ids")?, labels: same_shape("labels")?, ids })
}

/// Writes beside the target first, so that a failure leaves nothing half-written.
fn write(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = |action| crate::files::Error::io(action, path);
    let staged = tempfile::NamedTempFile::new_in(folder).map_err(io("write"))?;
    candle_core::safetensors::save(tensors, staged.path()).into_diagnostic()?;
    staged.persist(path).map_err(|e| io("write")(e.error))?;
    Ok(())
}
