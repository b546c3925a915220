//! Negative log-likelihoods of labels.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, Source, accumulator, int, is_vector, tensor};
use crate::base::ops::{LabelLoss, LogitMap, Tangent};

/// Elements of logits that exist at a time.
const CHUNK: usize = 1 << 27;

/// Threads that work on a row.
const THREADS: usize = 512;

/// See [`label_loss`](crate::base::ops::label_loss()): of a map of one type, of which nothing is trained. Logits live for some rows
/// at a time, and become the gradients that the hidden states' are taken from.
pub(crate) fn label_loss(hidden: &Tensor, map: &LogitMap, targets: &[u32]) -> Result<LabelLoss> {
    let (rows, _) = hidden.dims2()?;
    let vocab = map.weight.dim(0)?;
    let targets = Tensor::new(targets, hidden.device())?;
    let chunk = (CHUNK / vocab.max(1)).clamp(1, rows.max(1));
    let (mut found, mut slopes) = (Vec::new(), Vec::new());
    let bias = map.bias.as_ref().map(Tensor::contiguous).transpose()?;
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let x = hidden.narrow(0, start, count)?.detach();
        let logits = x.matmul(&map.weight.t()?)?;
        let of = Of {
            bias: bias.clone(),
            targets: targets.narrow(0, start, count)?,
            scale: map.scale,
            cap: map.softcap.unwrap_or(0.0),
        };
        let losses = of.losses(&logits)?;
        if hidden.track_op() {
            logits.inplace_op1(&InPlace { of, found: losses.clone() })?;
            slopes.push(logits.matmul(&map.weight)?);
        }
        found.push(losses);
    }
    let found = Tensor::cat(&found, 1)?;
    let (nll, predicted) = (found.get(0)?, found.get(2)?.to_dtype(DType::U32)?);
    let nll = match slopes.is_empty() {
        true => nll,
        false => hidden.contiguous()?.apply_op1(Tangent { value: nll, slope: Tensor::cat(&slopes, 0)? })?,
    };
    Ok(LabelLoss { nll, predicted })
}

/// See [`logits_loss`](crate::base::ops::logits_loss()).
pub(crate) fn logits_loss(logits: &Tensor, targets: &[u32]) -> Result<LabelLoss> {
    let logits = logits.contiguous()?;
    let targets = Tensor::new(targets, logits.device())?;
    let of = Of { bias: None, targets, scale: 1.0, cap: 0.0 };
    let found = of.losses(&logits)?;
    let predicted = found.get(2)?.to_dtype(DType::U32)?;
    let rows = found.dim(1)?;
    let nll = computed::of_one(&logits, "logits-loss", copied(&found.get(0)?)?, rows, move |[logits], _, grad| {
        let grad = grad.to_dtype(accumulator(logits.dtype()))?.contiguous()?;
        let (rows, vocab) = logits.dims2()?;
        let is_vector = is_vector(&[logits], &[vocab]);
        let from = (Argument::Input(logits), logits.dtype());
        let call = of.gradient(from, [rows, vocab], &found, Some(&grad), is_vector)?;
        let [gradient] = call.run([(logits.dtype(), rows * vocab)])?;
        Ok([Some(tensor(gradient, (rows, vocab)))])
    })?;
    Ok(LabelLoss { nll, predicted })
}

/// A storage of a tensor's own.
fn copied(x: &Tensor) -> Result<Storage> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(Storage::Cpu(rows_of(storage, layout)?)),
        Storage::Cuda(storage) => Ok(Storage::Cuda(rows_of(storage, layout)?)),
        _ => candle_core::bail!("logits-loss: neither on the CPU nor on a CUDA device"),
    }
}

fn rows_of<S: BackendStorage>(storage: &S, layout: &Layout) -> Result<S> {
    storage.affine(layout, 1.0, 0.0)
}

/// What losses are of, beside the logits.
struct Of {
    bias: Option<Tensor>,
    /// `[rows]`.
    targets: Tensor,
    scale: f64,
    /// Zero for none.
    cap: f64,
}

impl Of {
    /// `[3, rows]`: losses, `ln Σ exp(logit)`, most likely labels.
    fn losses(&self, logits: &Tensor) -> Result<Tensor> {
        let (rows, vocab) = logits.dims2()?;
        let mut arguments = vec![Argument::Input(logits), self.bias.as_ref().into(), Argument::Input(&self.targets)];
        arguments.extend([Argument::Output(0), int(rows)?, int(vocab)?]);
        arguments.extend([Argument::F64(self.scale), Argument::F64(self.cap)]);
        arguments.push(is_vector(&[logits], &[vocab]).into());
        let (real, block, shared) = (logits.dtype(), [THREADS, 1], 0);
        let (source, entry, grid) = (Source::Loss, "loss_forward", [rows, 1, 1]);
        let call = Call { source, real, entry, grid, block, shared, arguments };
        let [found] = call.run([(accumulator(real), 3 * rows)])?;
        Ok(tensor(found, (3, rows)))
    }

    /// The call for the gradient by the raw logits, which lie in `logits`.
    fn gradient<'a>(
        &'a self,
        (logits, real): (Argument<'a>, DType),
        [rows, vocab]: [usize; 2],
        found: &'a Tensor,
        factors: Option<&'a Tensor>,
        is_vector: bool,
    ) -> Result<Call<'a>> {
        let mut arguments = vec![logits, self.bias.as_ref().into(), Argument::Input(&self.targets)];
        arguments.extend([Argument::Input(found), factors.into(), Argument::Output(0), int(rows)?, int(vocab)?]);
        arguments.extend([Argument::F64(self.scale), Argument::F64(self.cap), is_vector.into()]);
        let blocks = vocab.div_ceil(THREADS * 4 * 16 / real.size_in_bytes());
        let (source, entry, block) = (Source::Loss, "loss_backward", [THREADS, 1]);
        Ok(Call { source, real, entry, grid: [rows, blocks, 1], block, shared: 0, arguments })
    }
}

/// Makes of raw logits the gradient of their losses.
struct InPlace {
    of: Of,
    found: Tensor,
}

impl InPlace {
    fn call(&self, real: DType, layout: &Layout) -> Result<Call<'_>> {
        let (rows, vocab) = layout.shape().dims2()?;
        if !layout.is_contiguous() || layout.start_offset() != 0 {
            candle_core::bail!("label-loss: logits of {:?} are not dense", layout.shape());
        }
        let is_vector = vocab.is_multiple_of(16 / real.size_in_bytes());
        self.of.gradient((Argument::Output(0), real), [rows, vocab], &self.found, None, is_vector)
    }
}

impl InplaceOp1 for InPlace {
    fn name(&self) -> &'static str {
        "loss-gradient"
    }

    #[cfg(test)]
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        super::emulator::run_on(&self.call(storage.dtype(), layout)?, storage)
    }

    #[cfg(not(test))]
    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("label-loss: this is a CUDA device's operation")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (real, device) = (storage.dtype(), storage.device().clone());
        super::device::launch(&self.call(real, layout)?, &mut [storage], &device)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("label-loss: built without the feature `cuda`")
    }
}
