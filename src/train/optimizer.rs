//! AdamW (arXiv 1711.05101, Algorithm 2) with float32 moments that can be saved.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
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
                let zeros = Tensor::zeros(var.shape(), DType::F32, var.device())?;
                Ok((name.clone(), (zeros.clone(), zeros)))
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
            *first = ((&*first * beta1)? + (gradient * (1.0 - beta1))?)?;
            *second = ((&*second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((&*second / correction2)?.sqrt()? + epsilon)?;
            let update = ((&*first / correction1)? / denominator)?;
            let value = var.as_detached_tensor().to_dtype(DType::F32)?;
            let decay = if var.rank() > 1 { weight_decay } else { 0.0 };
            let value = ((value * (1.0 - rate * decay))? - (update * rate)?)?;
            var.set(&value.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    /// The moments as named tensors, `{name}.first` and `{name}.second`.
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

/// Adds the gradients of one backward pass, in float32, to those gathered so far.
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
        let gradient = gradient.detach().to_dtype(DType::F32)?;
        let sum = match gathered.get(name) {
            Some(so_far) => (so_far + gradient)?,
            None => gradient,
        };
        gathered.insert(name.clone(), sum);
    }
    Ok(())
}

/// Scales all gradients down together when their global L2 norm exceeds `max_norm`; returns the norm before.
///
/// # Errors
/// When a gradient cannot be read.
pub fn clip_gradients(gradients: &mut BTreeMap<String, Tensor>, max_norm: Option<f64>) -> Result<f64> {
    let mut squares = 0.0;
    for gradient in gradients.values() {
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    if let Some(max_norm) = max_norm
        && norm > max_norm
    {
        for gradient in gradients.values_mut() {
            *gradient = (&*gradient * (max_norm / (norm + 1e-6)))?;
        }
    }
    Ok(norm)
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
