//! Activation checkpointing (arXiv 1604.06174): a pass that keeps only the input of each layer, and computes the rest again,
//! layer by layer, on the way back.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::decoder::{Decoder, Pass};
use super::{Error, Input, Result, SiteHook, ops};

/// A forward pass whose backward pass runs layer by layer.
pub struct CheckpointedPass<'a> {
    decoder: &'a Decoder,
    input: &'a Input,
    pass: Pass<'a>,
    /// What each layer was given, detached.
    layer_inputs: Vec<Tensor>,
    /// The lowest layer with something to train.
    lowest: Option<usize>,
    /// What the last layer made: the leaf of the graph that ends in the loss.
    last: Var,
}

impl<'a> CheckpointedPass<'a> {
    /// Runs the layers.
    ///
    /// # Errors
    /// Those of [`Decoder::hidden_states`].
    pub fn forward(decoder: &'a Decoder, input: &'a Input, hook: &'a dyn SiteHook) -> Result<Self> {
        let action = Error::candle("running the decoder");
        decoder.check(input, None, hook)?;
        let pass = decoder.pass(input, hook).map_err(&action)?;
        let mut x = decoder.embed(input, hook).map_err(&action)?.detach();
        let mut layer_inputs = Vec::new();
        let mut lowest = None;
        for index in 0..decoder.spec().num_layers {
            let y = decoder.layer(index, &x, &pass, None)?;
            if y.track_op() {
                lowest = lowest.or(Some(index));
            }
            layer_inputs.push(std::mem::replace(&mut x, y.detach()));
        }
        let last = Var::from_tensor(&x).map_err(&action)?;
        Ok(Self { decoder, input, pass, layer_inputs, lowest, last })
    }

    /// The residual stream after the final norm, `[batch, seq, hidden_size]`. Its graph ends at the last layer.
    ///
    /// # Errors
    /// When candle fails.
    pub fn hidden_states(&self) -> Result<Tensor> {
        self.decoder.finish(self.last.as_tensor().clone())
    }

    /// Goes on where the backward pass of a loss over [`hidden_states`](Self::hidden_states) ended; hands the gradients of
    /// each part of the model to `take`, those of the loss first.
    ///
    /// # Errors
    /// When candle or `take` fails.
    pub fn backward(
        mut self,
        loss: &Tensor,
        take: &mut dyn FnMut(&GradStore) -> candle_core::Result<()>,
    ) -> Result<()> {
        let action = Error::candle("computing gradients");
        let store = ops::backward(loss).map_err(&action)?;
        take(&store).map_err(&action)?;
        let mut gradient = store.get(&self.last).map(Tensor::detach);
        drop(store);
        let trains_embedding = self.decoder.trains_embedding();
        let lowest = if trains_embedding { Some(0) } else { self.lowest };
        for index in (lowest.unwrap_or(usize::MAX)..self.layer_inputs.len()).rev() {
            let (Some(x), Some(g)) = (self.layer_inputs.pop(), gradient.take()) else { return Ok(()) };
            let x = Var::from_tensor(&x).map_err(&action)?;
            let needs_input = trains_embedding || Some(index) > lowest;
            let given = if needs_input { x.as_tensor().clone() } else { x.as_detached_tensor() };
            let y = self.decoder.layer(index, &given, &self.pass, None)?;
            let store = continue_backward(&y, &g).map_err(&action)?;
            take(&store).map_err(&action)?;
            gradient = store.get(&x).map(Tensor::detach);
        }
        if let (true, Some(g)) = (trains_embedding, gradient) {
            let y = self.decoder.embed(self.input, self.pass.hook).map_err(&action)?;
            let store = continue_backward(&y, &g).map_err(&action)?;
            take(&store).map_err(&action)?;
        }
        Ok(())
    }
}

/// The gradients of what `y` was computed from, given the gradient of `y`.
fn continue_backward(y: &Tensor, gradient: &Tensor) -> candle_core::Result<GradStore> {
    ops::backward(&(y * gradient)?.sum_all()?)
}
