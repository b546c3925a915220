//! Gradients of one micro-batch.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use super::optimizer::accumulate;
use super::pages::{self, Pages};
use super::{BatchLoss, Error, Models, Objective, Result, batch_input};
use crate::base::ops::backward;
use crate::base::{Kept, LayerwisePass, SiteHook};
use crate::data::Batch;

/// What gradients are taken of, and how.
pub struct BatchGradients<'a> {
    /// The model that is trained or adapted, and the one before training.
    pub models: Models<'a>,
    /// The adapter at work.
    pub hook: &'a dyn SiteHook,
    /// What is trained, by name.
    pub vars: &'a BTreeMap<String, Var>,
    /// What is minimised.
    pub objective: &'a dyn Objective,
    /// Whether only the inputs of layers are kept for the backward pass, which computes the rest again.
    pub checkpoint_activations: bool,
}

/// Adds the gradients of `batch`'s loss times `factor` to `gradients`, by variable name, in float32; returns the loss.
///
/// # Errors
/// When the batch does not fit the model or the objective.
pub fn batch_gradients(
    of: &BatchGradients,
    batch: &Batch,
    factor: f64,
    gradients: &mut BTreeMap<String, Tensor>,
) -> Result<BatchLoss> {
    let input = batch_input(batch)?;
    let scaled = |loss: &BatchLoss| (&loss.sum * factor).map_err(Error::candle("computing the loss"));
    // gradients as large as the model are wanted in the place of what the layers keep
    let kept = match (of.checkpoint_activations, of.models.trained.trains_embedding()) {
        (true, _) => Some(Kept::Inputs),
        (false, true) => Some(Kept::Graphs),
        (false, false) => None,
    };
    let mut loss = if let Some(kept) = kept {
        let pass = LayerwisePass::forward(of.models.trained, &input, of.hook, kept)?;
        let loss = of.objective.loss(of.models, &pass.hidden_states()?, batch)?;
        let (mut pages, mut held) = (Pages::default(), pages::bytes(gradients));
        pass.backward(&scaled(&loss)?, &mut |found| {
            accumulate(gradients, of.vars, found)?;
            let bytes = pages::bytes(gradients);
            pages.moved(bytes - std::mem::replace(&mut held, bytes));
            Ok(())
        })?;
        loss
    } else {
        let hidden = of.models.trained.hidden_states(&input, None, of.hook)?;
        let loss = of.objective.loss(of.models, &hidden, batch)?;
        let found = backward(&scaled(&loss)?).map_err(Error::candle("computing gradients"))?;
        accumulate(gradients, of.vars, &found).map_err(Error::candle("adding gradients"))?;
        loss
    };
    // the number is all that is wanted of it: its graph would hold every activation
    loss.sum = loss.sum.detach();
    Ok(loss)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::adapter::{Adapter, AdapterConfig};
    use crate::base::{Checkpoint, Decoder};
    use crate::train::Sft;

    /// Every gradient of a pass that keeps only layer inputs is that of a whole pass, also where lower layers train nothing.
    #[test]
    fn checkpointed_gradients_are_those_of_a_whole_pass() {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo/model");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        let batch = Batch {
            input_ids: vec![5, 6, 7, 8, 9, 5, 4, 3],
            attention_mask: vec![1, 1, 1, 1, 0, 1, 1, 1],
            position_ids: vec![0, 1, 2, 3, 0, 0, 1, 2],
            labels: vec![-100, 6, 7, 8, -100, -100, 4, 3],
            segments: None,
            batch: 2,
            seq: 4,
        };
        for layers in [None, Some(vec![1, 2])] {
            let config = AdapterConfig { layers, ..AdapterConfig::prefix_plus(checkpoint.spec(), None) };
            let (adapter, vars) = Adapter::zeros(config).unwrap().trainable(DType::F64, &Device::Cpu).unwrap();
            for (at, var) in vars.values().enumerate() {
                let values: Vec<f64> = (0..var.elem_count()).map(|i| ((at + i) as f64 * 1.3).sin() * 0.1).collect();
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            }
            let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
            let of = |checkpoint_activations| {
                let of = BatchGradients {
                    models: Models::frozen(&decoder),
                    hook: &*hook,
                    vars: &vars,
                    objective: &Sft,
                    checkpoint_activations,
                };
                let mut gradients = BTreeMap::new();
                let loss = batch_gradients(&of, &batch, 0.2, &mut gradients).unwrap().value().unwrap();
                (loss, gradients)
            };
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
