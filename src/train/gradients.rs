//! Gradients of one batch.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};

use super::optimizer::accumulate;
use super::{CompletionLoss, Error, Result, completion_loss, hidden_loss};
use crate::base::{CheckpointedPass, Decoder, Input, SiteHook};

/// The mean loss over the labelled positions of a batch, and its gradients by variable name, in float32. With `checkpoint`
/// only the inputs of layers are kept for the backward pass.
///
/// # Errors
/// When the batch does not fit the model, or holds no label.
pub fn completion_gradients(
    decoder: &Decoder,
    hook: &dyn SiteHook,
    vars: &BTreeMap<String, Var>,
    input: &Input,
    labels: &[i64],
    checkpoint: bool,
) -> Result<(f64, BTreeMap<String, Tensor>)> {
    let mut gradients = BTreeMap::new();
    let mean = |loss: CompletionLoss| {
        let tokens = loss.tokens() as f64;
        (loss.sum / tokens).map_err(Error::candle("computing the loss"))
    };
    let value = |loss: &Tensor| {
        let value = loss.to_dtype(DType::F64).and_then(|l| l.to_scalar::<f64>());
        value.map_err(Error::candle("reading the loss"))
    };
    if checkpoint {
        let pass = CheckpointedPass::forward(decoder, input, hook)?;
        let loss = mean(hidden_loss(decoder, &pass.hidden_states()?, labels)?)?;
        pass.backward(&loss, &mut |store| accumulate(&mut gradients, vars, store))?;
        return Ok((value(&loss)?, gradients));
    }
    let loss = mean(completion_loss(decoder, hook, input, labels)?)?;
    let store = loss.backward().map_err(Error::candle("computing gradients"))?;
    accumulate(&mut gradients, vars, &store).map_err(Error::candle("adding gradients"))?;
    Ok((value(&loss)?, gradients))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::adapter::{Adapter, AdapterConfig};
    use crate::base::Checkpoint;

    /// Every gradient of a pass that keeps only layer inputs is that of a whole pass, also where lower layers train nothing.
    #[test]
    fn checkpointed_gradients_are_those_of_a_whole_pass() {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo/model");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        let input = Input::new(2, &[5, 6, 7, 8, 9, 5, 4, 3], &[1, 1, 1, 1, 0, 1, 1, 1], None).unwrap();
        let labels = [-100, 6, 7, 8, -100, -100, 4, 3];
        for layers in [None, Some(vec![1, 2])] {
            let config = AdapterConfig { layers, ..AdapterConfig::prefix_plus(checkpoint.spec(), None) };
            let (adapter, vars) = Adapter::zeros(config).unwrap().trainable(DType::F64, &Device::Cpu).unwrap();
            for (at, var) in vars.values().enumerate() {
                let values: Vec<f64> = (0..var.elem_count()).map(|i| ((at + i) as f64 * 1.3).sin() * 0.1).collect();
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            }
            let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
            let of = |checkpoint| completion_gradients(&decoder, &*hook, &vars, &input, &labels, checkpoint).unwrap();
            let ((loss, whole), (checkpointed_loss, checkpointed)) = (of(false), of(true));
            assert_eq!(loss, checkpointed_loss);
            assert_eq!(whole.len(), vars.len());
            for (name, gradient) in &whole {
                let difference = (gradient - &checkpointed[name]).unwrap().abs().unwrap().max_all().unwrap();
                assert!(difference.to_scalar::<f32>().unwrap() < 1e-7, "{name}");
            }
        }
    }
}
