//! AdamW (arXiv 1711.05101, Algorithm 2) with float32 moments that can be saved.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor, Var};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The optimizer's constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, multiplied by the rate. Norms, biases and other tensors of one dimension do not decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer and its state.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    vars: BTreeMap<String, Var>,
    /// First and second moment of each variable, float32.
    moments: BTreeMap<String, (Tensor, Tensor)>,
    steps: usize,
}

impl AdamW {
    /// An optimizer at its start.
    ///
    /// # Errors
    /// When the device cannot hold the moments.
    pub fn new(config: AdamWConfig, vars: BTreeMap<String, Var>) -> Result<Self> {
        let moments = vars
            .iter()
            .map(|(name, var)| {
                // each is changed where it lies
                let zeros = || Tensor::zeros(var.shape(), DType::F32, var.device());
                Ok((name.clone(), (zeros()?, zeros()?)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, vars, moments, steps: 0 })
    }

    /// The trained variables.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// One step along float32 gradients by variable name.
    ///
    /// # Errors
    /// When a gradient has another shape than its variable.
    pub fn step(&mut self, gradients: &BTreeMap<String, Tensor>, rate: f64) -> Result<()> {
        self.steps += 1;
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powi(self.steps as i32);
        let correction2 = 1.0 - beta2.powi(self.steps as i32);
        for (name, var) in &self.vars {
            let (Some(gradient), Some((first, second))) = (gradients.get(name), self.moments.get_mut(name)) else {
                continue;
            };
            let gradient = gradient.contiguous()?;
            let decay = if var.rank() > 1 { weight_decay } else { 0.0 };
            let update = Update {
                keep: (1.0 - rate * decay) as f32,
                rate: (rate / correction1) as f32,
                root: correction2.sqrt().recip() as f32,
                epsilon: epsilon as f32,
            };
            if !is_in_place(var) {
                *first = decayed(first, &gradient, beta1)?;
                *second = decayed(second, &gradient.sqr()?, beta2)?;
                let value = update.composed(&var.as_detached_tensor().to_dtype(DType::F32)?, first, second)?;
                var.set(&value.to_dtype(var.dtype())?)?;
                continue;
            }
            first.inplace_op2(&gradient, &Decay::new(beta1, |g| g))?;
            second.inplace_op2(&gradient, &Decay::new(beta2, |g| g * g))?;
            if var.dtype() == DType::F32 {
                var.as_tensor().inplace_op3(first, second, &update)?;
            } else {
                let value = var.as_detached_tensor().to_dtype(DType::F32)?;
                value.inplace_op3(first, second, &update)?;
                var.set(&value.to_dtype(var.dtype())?)?;
            }
        }
        Ok(())
    }

    /// The moments as named tensors, `{name}.first` and `{name}.second`; the next step changes them where they are.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        self.moments
            .iter()
            .flat_map(|(name, (first, second))| {
                [(format!("{name}.first"), first.clone()), (format!("{name}.second"), second.clone())]
            })
            .collect()
    }

    /// Puts back what [`state`](Self::state) gave after `steps` steps. `None` when a tensor is missing or misshapen.
    pub fn restore(&mut self, state: &std::collections::HashMap<String, Tensor>, steps: usize) -> Option<()> {
        for (name, (first, second)) in &mut self.moments {
            for (suffix, moment) in [("first", first), ("second", second)] {
                let saved = state.get(&format!("{name}.{suffix}"))?;
                if saved.shape() != moment.shape() || saved.dtype() != DType::F32 {
                    return None;
                }
                *moment = saved.to_device(moment.device()).ok()?;
            }
        }
        self.steps = steps;
        Some(())
    }
}

/// Whether numbers are changed where they are: on the CPU.
fn is_in_place(x: &Tensor) -> bool {
    x.device().is_cpu()
}

/// `keep · moment + (1 − keep) · of`.
fn decayed(moment: &Tensor, of: &Tensor, keep: f64) -> Result<Tensor> {
    (moment * keep)? + (of * (1.0 - keep))?
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 14;

/// The numbers of a contiguous float32 tensor on the CPU.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("the optimizer takes contiguous float32 tensors on the CPU"),
    }
}

/// The same, to be changed.
fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("the optimizer takes contiguous float32 tensors on the CPU"),
    }
}

/// `moment = keep · moment + take · of(gradient)`.
struct Decay {
    keep: f32,
    take: f32,
    of: fn(f32) -> f32,
}

impl Decay {
    fn new(beta: f64, of: fn(f32) -> f32) -> Self {
        Self { keep: beta as f32, take: (1.0 - beta) as f32, of }
    }
}

impl InplaceOp2 for Decay {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, moment: &mut CpuStorage, lm: &Layout, gradient: &CpuStorage, lg: &Layout) -> Result<()> {
        let (moment, gradient) = (floats_mut(moment, lm)?, floats(gradient, lg)?);
        moment.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(moment, gradient)| {
            for (m, g) in moment.iter_mut().zip(gradient) {
                *m = self.keep * *m + self.take * (self.of)(*g);
            }
        });
        Ok(())
    }
}

/// `x = keep · x − rate · first / (root · √second + epsilon)`.
struct Update {
    keep: f32,
    rate: f32,
    root: f32,
    epsilon: f32,
}

impl Update {
    /// The new value, as a tensor of its own.
    fn composed(&self, value: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        let [keep, rate, root, epsilon] = [self.keep, self.rate, self.root, self.epsilon].map(f64::from);
        let slope = ((first * rate)? / second.sqrt()?.affine(root, epsilon)?)?;
        (value * keep)? - slope
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        value: &mut CpuStorage,
        lx: &Layout,
        first: &CpuStorage,
        lm: &Layout,
        second: &CpuStorage,
        lv: &Layout,
    ) -> Result<()> {
        let (value, first, second) = (floats_mut(value, lx)?, floats(first, lm)?, floats(second, lv)?);
        let moments = first.par_chunks(CHUNK).zip(second.par_chunks(CHUNK));
        value.par_chunks_mut(CHUNK).zip(moments).for_each(|(value, (first, second))| {
            for ((x, m), v) in value.iter_mut().zip(first).zip(second) {
                *x = self.keep * *x - self.rate * *m / (self.root * v.sqrt() + self.epsilon);
            }
        });
        Ok(())
    }
}

/// `x = factor · x`.
struct Scale(f32);

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        floats_mut(x, layout)?.par_iter_mut().with_min_len(CHUNK).for_each(|x| *x *= self.0);
        Ok(())
    }
}

/// `sum = sum + x`.
struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, ls: &Layout, x: &CpuStorage, lx: &Layout) -> Result<()> {
        let (sum, x) = (floats_mut(sum, ls)?, floats(x, lx)?);
        sum.par_iter_mut().zip(x).with_min_len(CHUNK).for_each(|(sum, x)| *sum += *x);
        Ok(())
    }
}

/// Adds the gradients of one backward pass, in float32, to those gathered so far. A gradient that is the first of its variable
/// is taken as it is, and later ones are added to it.
///
/// # Errors
/// When shapes differ.
pub(super) fn accumulate(
    gathered: &mut BTreeMap<String, Tensor>,
    vars: &BTreeMap<String, Var>,
    gradients: &GradStore,
) -> Result<()> {
    for (name, var) in vars {
        let Some(gradient) = gradients.get(var) else { continue };
        // a gradient remembers the activations that it was computed from, and whatever sums it would keep them alive
        let gradient = gradient.detach().to_dtype(DType::F32)?.contiguous()?;
        match gathered.get(name) {
            Some(so_far) if so_far.shape() == gradient.shape() && is_in_place(so_far) => {
                so_far.inplace_op2(&gradient, &Add)?;
            }
            Some(so_far) if so_far.shape() == gradient.shape() => {
                let sum = (so_far + gradient)?;
                gathered.insert(name.clone(), sum);
            }
            Some(so_far) => {
                candle_core::bail!("gradients of {name} are {:?} and {:?}", so_far.shape(), gradient.shape())
            }
            None => {
                gathered.insert(name.clone(), gradient);
            }
        }
    }
    Ok(())
}

/// Scales all gradients down together, where they are, when their global L2 norm exceeds `max_norm`; returns the norm before.
///
/// # Errors
/// When a gradient cannot be read.
pub fn clip_gradients(gradients: &mut BTreeMap<String, Tensor>, max_norm: Option<f64>) -> Result<f64> {
    let mut squares = 0.0;
    // those of another device are read together, once
    let mut apart = Vec::new();
    for gradient in gradients.values_mut() {
        if !gradient.is_contiguous() {
            *gradient = gradient.contiguous()?;
        }
        match is_in_place(gradient) {
            true => squares += sum_of_squares(gradient)?,
            false => apart.push(gradient.sqr()?.sum_all()?.to_dtype(DType::F64)?),
        }
    }
    if !apart.is_empty() {
        squares += Tensor::stack(&apart, 0)?.sum_all()?.to_scalar::<f64>()?;
    }
    let norm = squares.sqrt();
    if let Some(max_norm) = max_norm
        && norm > max_norm
    {
        let factor = max_norm / (norm + 1e-6);
        for gradient in gradients.values_mut() {
            match is_in_place(gradient) {
                true => gradient.inplace_op1(&Scale(factor as f32))?,
                false => *gradient = (&*gradient * factor)?,
            }
        }
    }
    Ok(norm)
}

/// In float64, chunk by chunk, so that it does not depend on the number of threads.
fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { candle_core::bail!("a gradient is not on the CPU") };
    let chunks = floats(storage, layout)?.par_chunks(CHUNK);
    let sums: Vec<f64> = chunks.map(|chunk| chunk.iter().map(|x| f64::from(*x) * f64::from(*x)).sum()).collect();
    Ok(sums.into_iter().sum())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Three steps of `torch.optim.AdamW(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)` on x = [1, -2] with
    /// gradient 2x, by the update rule in float64; a tensor of one dimension is in a group without decay, as transformers'
    /// Trainer puts norms and biases.
    #[test]
    fn follows_the_update_rule() {
        follows(Var::new(&[[1f32, -2.0]], &Device::Cpu).unwrap(), 0.1);
        follows(Var::new(&[1f32, -2.0], &Device::Cpu).unwrap(), 0.0);
    }

    fn follows(var: Var, decay: f64) {
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(config, BTreeMap::from([("x".to_owned(), var.clone())])).unwrap();
        let mut expected = [1f64, -2.0];
        let (mut m, mut v) = ([0f64; 2], [0f64; 2]);
        for t in 1..=3 {
            let gradient = (var.as_tensor() * 2.0).unwrap();
            optimizer.step(&BTreeMap::from([("x".to_owned(), gradient)]), 0.1).unwrap();
            for i in 0..2 {
                let g = 2.0 * expected[i];
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
                expected[i] = expected[i] * (1.0 - 0.1 * decay) - 0.1 * mh / (vh.sqrt() + 1e-8);
            }
        }
        let found: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} vs {expected}");
        }
    }

    /// What another device computes is what is done in place.
    #[test]
    fn the_composed_update_is_that_in_place() {
        let cpu = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
        let (value, first, second) = (cpu([1.0, -2.0, 0.5]), cpu([0.1, 0.2, -0.3]), cpu([0.01, 0.5, 0.0]));
        let gradient = cpu([0.3, -0.7, 1.1]);
        let update = Update { keep: 0.99, rate: 0.05, root: 1.5, epsilon: 1e-3 };
        let moved = decayed(&first, &gradient, 0.9).unwrap();
        first.inplace_op2(&gradient, &Decay::new(0.9, |g| g)).unwrap();
        let expected = update.composed(&value, &moved, &second).unwrap();
        value.inplace_op3(&first, &second, &update).unwrap();
        for (found, expected) in [(&first, &moved), (&value, &expected)] {
            let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f32>().unwrap() < 1e-6);
        }
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let gradient = Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap();
        let mut gradients = BTreeMap::from([("x".to_owned(), gradient)]);
        assert!((clip_gradients(&mut gradients, Some(1.0)).unwrap() - 5.0).abs() < 1e-6);
        let clipped: Vec<f32> = gradients["x"].to_vec1().unwrap();
        assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
        assert!((clip_gradients(&mut gradients, Some(10.0)).unwrap() - 1.0).abs() < 1e-5);
    }
}
