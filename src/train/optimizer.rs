//! AdamW (arXiv 1711.05101, Algorithm 2) with float32 moments that can be saved.

mod moments;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor, Var};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pages::{self, Pages};
use crate::base::ops::Gradients;
use crate::files::{self, MappedFile};
use moments::Moments;

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
    moments: Moments,
    steps: usize,
}

impl AdamW {
    /// An optimizer at its start, with its moments where the variables are.
    ///
    /// # Errors
    /// When the device cannot hold the moments.
    pub fn new(config: AdamWConfig, vars: BTreeMap<String, Var>) -> Result<Self> {
        let moments = Moments::held(&vars)?;
        Ok(Self { config, vars, moments, steps: 0 })
    }

    /// An optimizer at its start, with its moments in a file in `folder` that is gone with the process.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn offloaded(config: AdamWConfig, vars: BTreeMap<String, Var>, folder: &Path) -> files::Result<Self> {
        let moments = Moments::offloaded(&vars, folder)?;
        Ok(Self { config, vars, moments, steps: 0 })
    }

    /// The trained variables.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// One step along float32 gradients by variable name, each of which is given up once its variable has moved.
    ///
    /// # Errors
    /// When a gradient has another shape than its variable, or a file of moments cannot be read or written.
    pub fn step(&mut self, mut gradients: BTreeMap<String, Tensor>, rate: f64) -> Result<()> {
        self.steps += 1;
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powi(self.steps as i32);
        let correction2 = 1.0 - beta2.powi(self.steps as i32);
        let decays = [Decay::new(beta1, |g| g), Decay::new(beta2, |g| g * g)];
        let mut pages = Pages::default();
        let freed = pages::bytes(&gradients);
        for (name, var) in &self.vars {
            let Some(gradient) = gradients.remove(name) else { continue };
            let gradient = gradient.contiguous()?;
            let decay = if var.rank() > 1 { weight_decay } else { 0.0 };
            let update = Update {
                keep: (1.0 - rate * decay) as f32,
                rate: (rate / correction1) as f32,
                root: correction2.sqrt().recip() as f32,
                epsilon: epsilon as f32,
            };
            let moments = match &mut self.moments {
                Moments::Held(moments) => moments,
                Moments::Offloaded(moments) => {
                    moments.step((name, var), &gradient, &decays, &update)?;
                    continue;
                }
            };
            let Some([first, second]) = moments.get_mut(name) else { continue };
            if !is_in_place(var) {
                *first = decayed(first, &gradient, beta1)?;
                *second = decayed(second, &gradient.sqr()?, beta2)?;
                let value = update.composed(&var.as_detached_tensor().to_dtype(DType::F32)?, first, second)?;
                var.set(&value.to_dtype(var.dtype())?)?;
                continue;
            }
            first.inplace_op2(&gradient, &decays[0])?;
            second.inplace_op2(&gradient, &decays[1])?;
            if var.dtype() == DType::F32 {
                var.as_tensor().inplace_op3(first, second, &update)?;
            } else {
                let value = var.as_detached_tensor().to_dtype(DType::F32)?;
                value.inplace_op3(first, second, &update)?;
                var.set(&value.to_dtype(var.dtype())?)?;
            }
        }
        // the next step's activations would be spread over the pages of what was given up
        drop(gradients);
        pages.moved(freed);
        Ok(())
    }

    /// Writes the moments to a safetensors file, `{name}.first` and `{name}.second` of each variable.
    ///
    /// # Errors
    /// Says why it cannot be written.
    pub(super) fn save(&self, path: &Path) -> std::result::Result<(), String> {
        self.moments.save(path)
    }

    /// Goes on from what [`save`](Self::save) wrote after `steps` steps.
    ///
    /// # Errors
    /// Says which tensor is missing or misshapen.
    pub(super) fn restore(&mut self, saved: &MappedFile, steps: usize) -> std::result::Result<(), String> {
        self.moments.restore(saved)?;
        self.steps = steps;
        Ok(())
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

    fn apply(&self, moment: &mut [f32], gradient: &[f32]) {
        for (m, g) in moment.iter_mut().zip(gradient) {
            *m = self.keep * *m + self.take * (self.of)(*g);
        }
    }
}

impl InplaceOp2 for Decay {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, moment: &mut CpuStorage, lm: &Layout, gradient: &CpuStorage, lg: &Layout) -> Result<()> {
        let (moment, gradient) = (floats_mut(moment, lm)?, floats(gradient, lg)?);
        let chunks = moment.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.for_each(|(moment, gradient)| self.apply(moment, gradient));
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
    fn apply(&self, value: &mut [f32], first: &[f32], second: &[f32]) {
        for ((x, m), v) in value.iter_mut().zip(first).zip(second) {
            *x = self.keep * *x - self.rate * *m / (self.root * v.sqrt() + self.epsilon);
        }
    }

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
        let chunks = value.par_chunks_mut(CHUNK).zip(moments);
        chunks.for_each(|(value, (first, second))| self.apply(value, first, second));
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
    found: &Gradients,
) -> Result<()> {
    for (name, var) in vars {
        if let Some(gradient) = found.store.get(var) {
            gather(gathered, name, gradient)?;
        }
        for rows in found.rows.iter().filter(|rows| rows.is_of(var)) {
            match gathered.get(name).filter(|sum| is_in_place(sum) && sum.dtype() == var.dtype()) {
                Some(sum) => rows.add_to(sum)?,
                None => {
                    let alone = var.zeros_like()?;
                    rows.add_to(&alone)?;
                    gather(gathered, name, &alone)?;
                }
            }
        }
    }
    Ok(())
}

fn gather(gathered: &mut BTreeMap<String, Tensor>, name: &str, gradient: &Tensor) -> Result<()> {
    // a gradient remembers the activations that it was computed from, and whatever sums it would keep them alive
    let gradient = gradient.detach().to_dtype(DType::F32)?.contiguous()?;
    let sum = match gathered.get(name) {
        Some(so_far) if so_far.shape() != gradient.shape() => {
            candle_core::bail!("gradients of {name} are {:?} and {:?}", so_far.shape(), gradient.shape())
        }
        Some(so_far) if is_in_place(so_far) => return so_far.inplace_op2(&gradient, &Add),
        Some(so_far) => (so_far + gradient)?,
        None => gradient,
    };
    gathered.insert(name.to_owned(), sum);
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
            optimizer.step(BTreeMap::from([("x".to_owned(), gradient)]), 0.1).unwrap();
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

    /// Moments in a file are those in memory to the bit, in numbers and when they are saved and taken over by either.
    #[test]
    fn offloaded_moments_are_those_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let start: Vec<f32> = (0..200_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let vars = |dtype: DType| {
            let large = Tensor::from_slice(&start, (400, 500), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let small = Tensor::new(&[1f32, -2.0], &Device::Cpu).unwrap();
            let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
            BTreeMap::from([("large".to_owned(), var(&large)), ("small".to_owned(), var(&small))])
        };
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let saved = |optimizer: &AdamW, name: &str| {
            let path = folder.path().join(name);
            optimizer.save(&path).unwrap();
            path
        };
        let numbers = |optimizer: &AdamW| -> Vec<Vec<f32>> {
            let numbers = |var: &Var| var.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
            optimizer.vars().values().map(numbers).collect()
        };
        for dtype in [DType::F32, DType::BF16] {
            let mut held = AdamW::new(config, vars(dtype)).unwrap();
            let mut offloaded = AdamW::offloaded(config, vars(dtype), folder.path()).unwrap();
            for turn in 0..3 {
                for optimizer in [&mut held, &mut offloaded] {
                    let gradient = |var: &Var| (var.as_detached_tensor().to_dtype(DType::F32).unwrap() * 2.0).unwrap();
                    let gradients = optimizer.vars().iter().map(|(name, var)| (name.clone(), gradient(var))).collect();
                    optimizer.step(gradients, 0.1).unwrap();
                }
                assert_eq!(numbers(&held), numbers(&offloaded), "{dtype:?}, {turn}");
                let (from_memory, from_file) = (saved(&held, "held"), saved(&offloaded, "offloaded"));
                assert_eq!(std::fs::read(&from_memory).unwrap(), std::fs::read(&from_file).unwrap());
                // each goes on from what the other wrote
                held.restore(&MappedFile::open(&from_file).unwrap(), turn + 1).unwrap();
                offloaded.restore(&MappedFile::open(&from_memory).unwrap(), turn + 1).unwrap();
            }
        }
        let other = BTreeMap::from([("small".to_owned(), Var::zeros(3, DType::F32, &Device::Cpu).unwrap())]);
        let mut other = AdamW::offloaded(config, other, folder.path()).unwrap();
        let why = other.restore(&MappedFile::open(&folder.path().join("held")).unwrap(), 1).unwrap_err();
        assert!(why.contains("small.first is F32 [2]"), "{why}");
        drop((other, std::fs::remove_file(folder.path().join("held"))));
        assert!(AdamW::offloaded(config, BTreeMap::new(), &folder.path().join("absent")).is_err());
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
