//! Negative log-likelihoods of labels, straight from hidden states.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed::{self, is_composed};
use super::held::{Held, is_held, numbers, tensor};
use super::inner_map::{Rows, column_sums};
use super::linear;
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, max, sum, vectorised};
use super::trained::Trained;

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
    /// The most likely label of each row, u32, `[rows]`.
    pub predicted: Tensor,
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

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten()
    }
}

/// Loss of one label for each row of `hidden`, `[rows, hidden]`. With a float map the logits live for a few rows at a time
/// only, and gradients are taken while they do.
///
/// # Errors
/// When the shapes do not fit, or a target is not below the vocabulary size.
pub fn label_loss(hidden: &Tensor, map: &LogitMap, targets: &[u32]) -> Result<LabelLoss> {
    let (rows, _) = hidden.dims2()?;
    let vocab = map.weight.dim(0)?;
    if rows != targets.len() || targets.iter().any(|target| *target as usize >= vocab) {
        candle_core::bail!("label-loss: {} targets below {vocab} for {rows} rows", targets.len());
    }
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes(hidden)
        && map.tensors().all(|tensor| !tensor.track_op() && tensor.dtype() == hidden.dtype())
    {
        return crate::base::cuda::label_loss(hidden, map, targets);
    }
    let is_fused = map.weight.dtype() == hidden.dtype() && map.tensors().all(is_held);
    if is_fused {
        let predicted = Arc::new(Mutex::new(Vec::new()));
        let trained = Trained::of(map.tensors())?;
        let token = trained.token().cloned();
        let op = FusedLoss {
            map: map.clone(),
            targets: targets.to_vec(),
            predicted: predicted.clone(),
            asks_input: hidden.track_op(),
            trained,
            gradients: Mutex::new(None),
        };
        let hidden = hidden.contiguous()?;
        let nll = match token {
            Some(token) => hidden.apply_op2(&token, op)?,
            None => hidden.apply_op1(op)?,
        };
        let predicted = std::mem::take(&mut *predicted.lock().unwrap_or_else(PoisonError::into_inner));
        return Ok(LabelLoss { nll, predicted: tensor(predicted, rows)? });
    }
    if is_composed(hidden) && !map.tensors().any(Tensor::track_op) {
        return composed::label_loss(hidden, map, targets);
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
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes(logits) {
        return crate::base::cuda::logits_loss(logits, targets);
    }
    if is_composed(logits) {
        return composed::logits_loss(logits, targets);
    }
    let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    let predicted = logits.detach().argmax(1)?;
    let nll = logits.contiguous()?.apply_op1(RowLoss { targets: targets.to_vec() })?;
    Ok(LabelLoss { nll, predicted })
}

/// Elements of logits that exist at a time.
const CHUNK: usize = 1 << 24;

struct FusedLoss {
    map: LogitMap,
    targets: Vec<u32>,
    predicted: Arc<Mutex<Vec<u32>>>,
    /// Whether the gradient of the hidden states will be asked for.
    asks_input: bool,
    trained: Trained,
    /// Gradients of `Σ nll_r`, made while the logits exist: of hidden states (row by row), weight and bias.
    gradients: Mutex<Option<[CpuStorage; 3]>>,
}

/// Loss and most likely label of each row.
type Found<T> = Vec<(T, u32)>;

/// Gradients of hidden states, weight and bias; empty where they are not asked for.
struct Gradients<T> {
    input: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl FusedLoss {
    fn asks_gradients(&self) -> bool {
        self.asks_input || self.trained.token().is_some()
    }

    /// Loss and most likely label of each row, and the gradients of `Σ factor_r · nll_r`; without factors they are one.
    fn run<T: Real + WithDType>(&self, x: &[T], factors: Option<&[T]>) -> Result<(Found<T>, Gradients<T>)> {
        let (held, held_bias) = (Held::of(&self.map.weight)?, self.map.bias.as_ref().map(Held::of).transpose()?);
        let bias: Option<&[T]> = held_bias.as_ref().map(Held::numbers).transpose()?;
        let (vocab, width) = self.map.weight.dims2()?;
        let weight = Matrix::new(held.numbers()?, vocab, width);
        let rows = self.targets.len();
        let chunk = (CHUNK / vocab.max(1)).clamp(1, rows.max(1));
        let mut logits = vec![T::zero(); chunk * vocab];
        let zeros = |count: usize, asked: bool| vec![T::zero(); if asked { count } else { 0 }];
        let mut gradients = Gradients {
            input: zeros(rows * width, self.asks_input),
            weight: zeros(vocab * width, self.map.weight.track_op()),
            bias: zeros(vocab, self.map.bias.as_ref().is_some_and(Tensor::track_op)),
        };
        let mut found = vec![(T::zero(), 0u32); rows];
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let logits = &mut logits[..count * vocab];
            let hidden = Matrix::new(&x[start * width..][..count * width], count, width);
            multiply(Target::strided(logits, vocab), false, T::one(), hidden, weight.t(), Threads::All);
            let targets = &self.targets[start..start + count];
            let rows = logits.par_chunks_mut(vocab).zip(targets).zip(&mut found[start..start + count]);
            rows.enumerate().for_each(|(row, ((logits, target), found))| {
                *found = vectorised(
                    #[inline(always)]
                    || {
                        let found = self.row(logits, bias, *target as usize);
                        if let Some(factors) = factors {
                            logits.iter_mut().for_each(|g| *g *= factors[start + row]);
                        }
                        found
                    },
                );
            });
            let by_logits = Matrix::new(logits, count, vocab);
            if self.asks_input {
                let target = Target::strided(&mut gradients.input[start * width..][..count * width], width);
                multiply(target, false, T::one(), by_logits, weight, Threads::All);
            }
            if !gradients.weight.is_empty() {
                let target = Target::strided(&mut gradients.weight, width);
                multiply(target, true, T::one(), by_logits.t(), hidden, Threads::All);
            }
            if !gradients.bias.is_empty() {
                let sums = column_sums(Rows::dense(logits, vocab), count, vocab, T::one());
                gradients.bias.iter_mut().zip(sums).for_each(|(bias, sum)| *bias += sum);
            }
        }
        Ok((found, gradients))
    }

    fn forward<T: Real + WithDType>(&self, x: &[T]) -> Result<CpuStorage> {
        let (found, gradients) = self.run::<T>(x, None)?;
        if self.asks_gradients() {
            let Gradients { input, weight, bias } = gradients;
            let storages = [input, weight, bias].map(T::to_cpu_storage_owned);
            *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(storages);
        }
        let mut predicted = self.predicted.lock().unwrap_or_else(PoisonError::into_inner);
        *predicted = found.iter().map(|(_, label)| *label).collect();
        Ok(T::to_cpu_storage_owned(found.into_iter().map(|(nll, _)| nll).collect()))
    }

    /// The gradient of the hidden states, where it is asked for.
    fn backward<T: Real + WithDType>(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (held, grad) = (Held::of(x)?, Held::of(grad)?);
        let factors: &[T] = grad.numbers()?;
        let first = factors.first().copied().unwrap_or(T::one());
        // the sum over rows is there already: it serves where all rows count the same
        let serves = self.trained.token().is_none() || factors.iter().all(|factor| *factor == first);
        let kept = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take().filter(|_| serves);
        let Gradients { input, weight, bias } = match kept {
            Some([input, weight, bias]) => {
                let numbers = |storage| -> Result<Vec<T>> { T::cpu_storage_data(storage) };
                let (mut input, mut weight, mut bias) = (numbers(input)?, numbers(weight)?, numbers(bias)?);
                let width = (input.len() / factors.len().max(1)).max(1);
                for (row, factor) in input.chunks_mut(width).zip(factors) {
                    row.iter_mut().for_each(|g| *g *= *factor);
                }
                let sums = weight.par_iter_mut().chain(bias.par_iter_mut());
                sums.with_min_len(1 << 13).for_each(|g| *g *= first);
                Gradients { input, weight, bias }
            }
            None => self.run(held.numbers()?, Some(factors))?.1,
        };
        if self.map.weight.track_op() {
            self.trained.leave(&self.map.weight, weight)?;
        }
        if let Some(of) = self.map.bias.as_ref().filter(|bias| bias.track_op()) {
            self.trained.leave(of, bias)?;
        }
        self.asks_input.then(|| tensor(input, x.shape())).transpose()
    }

    fn run_forward(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if self.map.weight.dim(1)? != width {
            let weight = self.map.weight.dims();
            candle_core::bail!("label-loss: input {:?} does not fit weight {weight:?}", layout.dims());
        }
        let nll = match x {
            CpuStorage::F32(_) => self.forward::<f32>(numbers(x, layout)?)?,
            CpuStorage::F64(_) => self.forward::<f64>(numbers(x, layout)?)?,
            _ => candle_core::bail!("label-loss: the input is neither float32 nor float64"),
        };
        Ok((nll, rows.into()))
    }

    fn run_backward(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F64 => self.backward::<f64>(x, &grad),
            _ => self.backward::<f32>(x, &grad),
        }
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
        if !self.asks_gradients() {
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
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _nll: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.run_backward(x, grad)
    }
}

impl CustomOp2 for FusedLoss {
    fn name(&self) -> &'static str {
        "label-loss"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _nll: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.run_backward(x, grad)?, self.trained.no_gradient()?))
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
                assert_eq!(found.predicted.to_vec1::<u32>().unwrap(), best);
                check_gradient(&x, |x| Ok(label_loss(x, map, &targets)?.nll));
            }
            // the rows count differently in `check_gradient`, and the same here
            let with = |weight: &Tensor, bias: Option<&Tensor>| {
                let map = LogitMap { weight: weight.clone(), bias: bias.cloned(), ..map.clone() };
                Ok(label_loss(&x, &map, &targets)?.nll)
            };
            let bias = map.bias.as_ref();
            check_gradient(&map.weight, |weight| with(weight, bias));
            check_gradient(&map.weight, |weight| with(weight, bias)?.sum_all());
            if let Some(bias) = bias {
                check_gradient(bias, |bias| with(&map.weight, Some(bias)));
                check_gradient(bias, |bias| with(&map.weight, Some(bias))?.sum_all());
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
        let likeliest = [&found, &exact]
            .map(|loss| label_loss(&exact_x, &exact_map, &loss.predicted.to_vec1::<u32>().unwrap()).unwrap().nll);
        assert!(max_difference(&likeliest[0], &likeliest[1]) < 1e-5);
        assert!(found.nll.sum_all().unwrap().backward().unwrap().get(&x).is_some());
    }

    #[test]
    fn targets_beyond_the_vocabulary_are_refused() {
        assert!(label_loss(&numbers(&[1, 5], 0.0), &map(7, 5, true), &[7]).is_err());
    }
}
