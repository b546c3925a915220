//! Negative log-likelihoods of labels, straight from hidden states.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::linear;
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, max, sum, vectorised};

/// From hidden states to logits: `cap · tanh(scale · (x · weightᵀ + bias) / cap)`.
#[derive(Clone, Debug)]
pub struct LogitMap {
    /// `[vocab, hidden]`.
    pub weight: Tensor,
    /// `[vocab]`.
    pub bias: Option<Tensor>,
    /// Factor on the logits.
    pub scale: f64,
    /// Soft cap of the logits.
    pub softcap: Option<f64>,
}

/// How likely labels are.
#[derive(Clone, Debug)]
pub struct LabelLoss {
    /// Negative log-likelihood of each label in nats, `[rows]`; float32, float64 for a float64 model.
    pub nll: Tensor,
    /// The most likely label of each row.
    pub predicted: Vec<u32>,
}

impl LogitMap {
    /// Logits of hidden states, `[…, hidden]` → `[…, vocab]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = linear(hidden, &self.weight, self.bias.as_ref())?;
        let logits = if self.scale == 1.0 { logits } else { (logits * self.scale)? };
        match self.softcap {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }

    fn is_trained(&self) -> bool {
        self.weight.track_op() || self.bias.as_ref().is_some_and(Tensor::track_op)
    }
}

/// Loss of one label for each row of `hidden`, `[rows, hidden]`. With a frozen float map the logits live for a few rows at
/// a time only, and the gradient is taken while they do.
///
/// # Errors
/// When the shapes do not fit, or a target is not below the vocabulary size.
pub fn label_loss(hidden: &Tensor, map: &LogitMap, targets: &[u32]) -> Result<LabelLoss> {
    let (rows, _) = hidden.dims2()?;
    let vocab = map.weight.dim(0)?;
    if rows != targets.len() || targets.iter().any(|target| *target as usize >= vocab) {
        candle_core::bail!("label-loss: {} targets below {vocab} for {rows} rows", targets.len());
    }
    let is_fused = !map.is_trained() && matches!(hidden.dtype(), DType::F32 | DType::F64) && hidden.device().is_cpu();
    if is_fused {
        let predicted = Arc::new(Mutex::new(Vec::new()));
        let op = FusedLoss {
            map: LogitMap {
                weight: map.weight.contiguous()?,
                bias: map.bias.as_ref().map(Tensor::contiguous).transpose()?,
                ..*map
            },
            targets: targets.to_vec(),
            predicted: predicted.clone(),
            gradient: hidden.track_op().then(|| Mutex::new(None)),
        };
        let nll = hidden.contiguous()?.apply_op1(op)?;
        let predicted = std::mem::take(&mut *predicted.lock().unwrap_or_else(PoisonError::into_inner));
        return Ok(LabelLoss { nll, predicted });
    }
    logits_loss(&map.logits(hidden)?, targets)
}

/// Loss of one label for each row of logits, `[rows, vocab]`; half types are computed in float32.
///
/// # Errors
/// When there is not one target below `vocab` for each row.
pub fn logits_loss(logits: &Tensor, targets: &[u32]) -> Result<LabelLoss> {
    let (rows, vocab) = logits.dims2()?;
    if rows != targets.len() || targets.iter().any(|target| *target as usize >= vocab) {
        candle_core::bail!("label-loss: {} targets below {vocab} for {rows} rows", targets.len());
    }
    let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    let predicted = logits.detach().argmax(1)?.to_vec1()?;
    let nll = logits.contiguous()?.apply_op1(RowLoss { targets: targets.to_vec() })?;
    Ok(LabelLoss { nll, predicted })
}

/// Elements of logits that exist at a time.
const CHUNK: usize = 1 << 24;

struct FusedLoss {
    map: LogitMap,
    targets: Vec<u32>,
    predicted: Arc<Mutex<Vec<u32>>>,
    /// `d nll_r / d x_r` of each row, `[rows, hidden]`, where it will be asked for.
    gradient: Option<Mutex<Option<Tensor>>>,
}

impl FusedLoss {
    fn run<T: Real + WithDType>(&self, x: &[T], rows: usize) -> Result<Vec<T>> {
        let storage = |tensor: &Tensor| -> Result<Vec<T>> { tensor.flatten_all()?.to_vec1() };
        let bias = self.map.bias.as_ref().map(storage).transpose()?;
        let (weight, layout) = self.map.weight.storage_and_layout();
        let Storage::Cpu(weight) = &*weight else { candle_core::bail!("label-loss: the weight is not on the CPU") };
        let (vocab, width) = self.map.weight.dims2()?;
        let weight = &T::cpu_storage_as_slice(weight)?[layout.start_offset()..][..vocab * width];
        let weight = Matrix::new(weight, vocab, width);
        let chunk = (CHUNK / vocab.max(1)).clamp(1, rows.max(1));
        let mut logits = vec![T::zero(); chunk * vocab];
        let mut gradient = vec![T::zero(); if self.gradient.is_some() { rows * width } else { 0 }];
        let mut found = vec![(T::zero(), 0u32); rows];
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let logits = &mut logits[..count * vocab];
            let hidden = Matrix::new(&x[start * width..][..count * width], count, width);
            multiply(Target::strided(logits, vocab), false, T::one(), hidden, weight.t(), Threads::All);
            let targets = &self.targets[start..start + count];
            let rows = logits.par_chunks_mut(vocab).zip(targets).zip(&mut found[start..start + count]);
            rows.for_each(|((logits, target), found)| {
                *found = vectorised(
                    #[inline(always)]
                    || self.row(logits, bias.as_deref(), *target as usize),
                );
            });
            if self.gradient.is_some() {
                let target = Target::strided(&mut gradient[start * width..][..count * width], width);
                multiply(target, false, T::one(), Matrix::new(logits, count, vocab), weight, Threads::All);
            }
        }
        if let Some(slot) = &self.gradient {
            let gradient = Tensor::from_vec(gradient, (rows, width), &candle_core::Device::Cpu)?;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
        }
        let mut predicted = self.predicted.lock().unwrap_or_else(PoisonError::into_inner);
        *predicted = found.iter().map(|(_, label)| *label).collect();
        Ok(found.into_iter().map(|(nll, _)| nll).collect())
    }

    /// Loss and most likely label of a row of raw logits, which become the gradient of the loss by them.
    #[inline(always)]
    fn row<T: Real>(&self, logits: &mut [T], bias: Option<&[T]>, target: usize) -> (T, u32) {
        let scale = T::of(self.map.scale);
        if let Some(bias) = bias {
            logits.iter_mut().zip(bias).for_each(|(z, b)| *z += *b);
        }
        if self.map.scale != 1.0 {
            logits.iter_mut().for_each(|z| *z = *z * scale);
        }
        let cap = self.map.softcap.map(T::of);
        if let Some(cap) = cap {
            logits.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
        }
        let largest = max(logits);
        let predicted = logits.iter().position(|z| *z == largest).unwrap_or(0) as u32;
        let label = logits[target];
        if self.gradient.is_none() {
            let total = log_sum(logits, |z| (z - largest).fast_exp());
            return (T::of(total) + largest - label, predicted);
        }
        // the cap's slope is needed after its logits are gone
        let slopes: Option<Vec<T>> = cap.map(|cap| logits.iter().map(|z| T::one() - (*z / cap) * (*z / cap)).collect());
        logits.iter_mut().for_each(|z| *z = (*z - largest).fast_exp());
        let total = log_sum(logits, |e| e);
        let factor = scale * T::of((-total).exp());
        logits.iter_mut().for_each(|e| *e = *e * factor);
        logits[target] = logits[target] - scale;
        if let Some(slopes) = slopes {
            logits.iter_mut().zip(slopes).for_each(|(g, slope)| *g = *g * slope);
        }
        (T::of(total) + largest - label, predicted)
    }
}

/// `ln Σ f(x)`, the sums of blocks gathered in float64.
#[inline(always)]
fn log_sum<T: Real>(row: &[T], f: impl Fn(T) -> T) -> f64 {
    row.chunks(1024).map(|block| sum(block, &f).wide()).sum::<f64>().ln()
}

impl CustomOp1 for FusedLoss {
    fn name(&self) -> &'static str {
        "label-loss"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if self.map.weight.dim(1)? != width {
            candle_core::bail!(
                "label-loss: input {:?} does not fit weight {:?}",
                layout.dims(),
                self.map.weight.dims()
            );
        }
        let (start, end) = (layout.start_offset(), layout.start_offset() + rows * width);
        let nll = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(&x[start..end], rows)?),
            CpuStorage::F64(x) => CpuStorage::F64(self.run(&x[start..end], rows)?),
            _ => candle_core::bail!("label-loss: the input is neither float32 nor float64"),
        };
        Ok((nll, rows.into()))
    }

    fn bwd(&self, _x: &Tensor, _nll: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let gradient =
            self.gradient.as_ref().and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let Some(gradient) = gradient else { candle_core::bail!("label-loss: its forward pass kept no gradient") };
        gradient.broadcast_mul(&grad.unsqueeze(1)?).map(Some)
    }
}

/// `logsumexp(logits_r) − logits_r[target_r]` of each row, with logits that exist already.
struct RowLoss {
    targets: Vec<u32>,
}

impl RowLoss {
    fn losses<T: Real>(&self, logits: &[T]) -> Vec<T> {
        let width = logits.len() / self.targets.len().max(1);
        let rows = logits.par_chunks(width.max(1)).zip(&self.targets);
        rows.map(|(row, target)| {
            vectorised(
                #[inline(always)]
                || {
                    let largest = max(row);
                    T::of(log_sum(row, |z| (z - largest).fast_exp())) + largest - row[*target as usize]
                },
            )
        })
        .collect()
    }

    fn gradient<T: Real>(&self, logits: &[T], nll: &[T], grad: &[T]) -> Vec<T> {
        let width = logits.len() / self.targets.len().max(1);
        let mut out = logits.to_vec();
        let rows = out.par_chunks_mut(width.max(1)).zip(&self.targets).zip(nll.par_iter().zip(grad));
        rows.for_each(|((row, target), (nll, grad))| {
            let log_total = *nll + row[*target as usize];
            vectorised(
                #[inline(always)]
                || row.iter_mut().for_each(|z| *z = (*z - log_total).fast_exp() * *grad),
            );
            row[*target as usize] = row[*target as usize] - *grad;
        });
        out
    }
}

impl CustomOp1 for RowLoss {
    fn name(&self) -> &'static str {
        "row-loss"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("row-loss: strided logits") };
        let nll = match logits {
            CpuStorage::F32(logits) => CpuStorage::F32(self.losses(&logits[start..end])),
            CpuStorage::F64(logits) => CpuStorage::F64(self.losses(&logits[start..end])),
            _ => candle_core::bail!("row-loss: the logits are neither float32 nor float64"),
        };
        Ok((nll, self.targets.len().into()))
    }

    fn bwd(&self, logits: &Tensor, nll: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        fn of<T: Real + WithDType>(op: &RowLoss, [logits, nll, grad]: [&Tensor; 3]) -> Result<Tensor> {
            let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<T>();
            let gradient = op.gradient(&values(logits)?, &values(nll)?, &values(grad)?);
            Tensor::from_vec(gradient, logits.shape(), logits.device())
        }
        let tensors = [logits, nll, grad];
        match logits.dtype() {
            DType::F64 => of::<f64>(self, tensors).map(Some),
            _ => of::<f32>(self, tensors).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Var};

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    fn map(vocab: usize, width: usize, is_plain: bool) -> LogitMap {
        let weight = (numbers(&[vocab, width], 1.0) * 2.0).unwrap();
        match is_plain {
            true => LogitMap { weight, bias: None, scale: 1.0, softcap: None },
            false => LogitMap { weight, bias: Some(numbers(&[vocab], 2.0)), scale: 1.5, softcap: Some(3.0) },
        }
    }

    #[test]
    fn losses_are_the_formula_and_gradients_exact_in_both_forms() {
        let (x, targets) = (numbers(&[3, 5], 0.0), [6, 0, 3]);
        for is_plain in [true, false] {
            let map = map(7, 5, is_plain);
            let logits = map.logits(&x).unwrap();
            let expected = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap();
            let at = Tensor::new(&targets[..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
            let expected = expected.gather(&at, 1).unwrap().squeeze(1).unwrap().neg().unwrap();
            let best: Vec<u32> = logits.argmax(1).unwrap().to_vec1().unwrap();
            let trained =
                LogitMap { weight: Var::from_tensor(&map.weight).unwrap().as_tensor().clone(), ..map.clone() };
            for map in [&map, &trained] {
                let found = label_loss(&x, map, &targets).unwrap();
                assert!(max_difference(&found.nll, &expected) < 1e-14);
                assert_eq!(found.predicted, best);
                check_gradient(&x, |x| Ok(label_loss(x, map, &targets)?.nll));
            }
        }
    }

    /// More rows than fit a chunk, in float32, against float64.
    #[test]
    fn chunks_make_no_difference() {
        let (vocab, width) = (40_000, 4);
        let rows = CHUNK / vocab + 3;
        let (exact_x, exact_map) = (numbers(&[rows, width], 0.0), map(vocab, width, true));
        let targets: Vec<u32> = (0..rows as u32).map(|row| row * 7).collect();
        let exact = label_loss(&exact_x, &exact_map, &targets).unwrap();
        let narrow = LogitMap { weight: exact_map.weight.to_dtype(DType::F32).unwrap(), ..exact_map.clone() };
        let x = Var::from_tensor(&exact_x.to_dtype(DType::F32).unwrap()).unwrap();
        let found = label_loss(x.as_tensor(), &narrow, &targets).unwrap();
        assert!(max_difference(&found.nll.to_dtype(DType::F64).unwrap(), &exact.nll) < 1e-5);
        let likeliest = [&found, &exact].map(|loss| label_loss(&exact_x, &exact_map, &loss.predicted).unwrap().nll);
        assert!(max_difference(&likeliest[0], &likeliest[1]) < 1e-5);
        assert!(found.nll.sum_all().unwrap().backward().unwrap().get(&x).is_some());
    }

    #[test]
    fn targets_beyond_the_vocabulary_are_refused() {
        assert!(label_loss(&numbers(&[1, 5], 0.0), &map(7, 5, true), &[7]).is_err());
    }
}
