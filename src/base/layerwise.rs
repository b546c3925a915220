//! Passes whose backward pass goes layer by layer, and gives up what a layer kept once it is done with it.
//!
//! [`Kept::Inputs`] is activation checkpointing (arXiv 1604.06174): only the input of each layer is kept, and the rest is computed
//! again on the way back.

use candle_core::{Tensor, Var};

use super::decoder::{Decoder, Pass};
use super::{Error, Input, Result, SiteHook, ops};

/// What a pass keeps of each layer for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Its input.
    Inputs,
    /// All that its backward pass reads.
    Graphs,
}

/// A forward pass whose backward pass runs layer by layer.
pub struct LayerwisePass<'a> {
    decoder: &'a Decoder,
    input: &'a Input,
    pass: Pass<'a>,
    layers: Vec<Run>,
    /// The lowest layer with something to train.
    lowest: Option<usize>,
    /// What the last layer made: the leaf of the graph that ends in the loss.
    last: Var,
}

/// A layer that has run.
struct Run {
    /// What it was given: the leaf of its graph, where there is one.
    input: Var,
    /// What it made, with its graph, where that is kept.
    output: Option<Tensor>,
}

impl<'a> LayerwisePass<'a> {
    /// Runs the layers.
    ///
    /// # Errors
    /// Those of [`Decoder::hidden_states`].
    pub fn forward(decoder: &'a Decoder, input: &'a Input, hook: &'a dyn SiteHook, kept: Kept) -> Result<Self> {
        let action = Error::candle("running the decoder");
        decoder.check(input, None, hook)?;
        let pass = decoder.pass(input, hook).map_err(&action)?;
        let mut x = decoder.embed(input, hook).map_err(&action)?.detach();
        let mut layers = Vec::new();
        let mut lowest = None;
        for index in 0..decoder.spec().num_layers {
            let input = Var::from_tensor(&x).map_err(&action)?;
            let given = match kept {
                Kept::Inputs => input.as_detached_tensor(),
                Kept::Graphs => input.as_tensor().clone(),
            };
            let y = decoder.layer(index, &given, &pass, None)?;
            if y.track_op() {
                lowest = lowest.or(Some(index));
            }
            x = y.detach();
            layers.push(Run { input, output: Some(y).filter(|_| kept == Kept::Graphs) });
        }
        let last = Var::from_tensor(&x).map_err(&action)?;
        Ok(Self { decoder, input, pass, layers, lowest, last })
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
        take: &mut dyn FnMut(&ops::Gradients) -> candle_core::Result<()>,
    ) -> Result<()> {
        let action = Error::candle("computing gradients");
        let gradients = ops::backward(loss).map_err(&action)?;
        take(&gradients).map_err(&action)?;
        let mut gradient = gradients.store.get(&self.last).map(Tensor::detach);
        drop(gradients);
        let trains_embedding = self.decoder.trains_embedding();
        let lowest = if trains_embedding { Some(0) } else { self.lowest };
        for index in (lowest.unwrap_or(usize::MAX)..self.layers.len()).rev() {
            let (Some(Run { input, output }), Some(g)) = (self.layers.pop(), gradient.take()) else { return Ok(()) };
            let needs_input = trains_embedding || Some(index) > lowest;
            let y = match output {
                Some(output) => output,
                None => {
                    let given = if needs_input { input.as_tensor().clone() } else { input.as_detached_tensor() };
                    self.decoder.layer(index, &given, &self.pass, None)?
                }
            };
            let gradients = continue_backward(&y, &g).map_err(&action)?;
            take(&gradients).map_err(&action)?;
            gradient = gradients.store.get(&input).map(Tensor::detach);
        }
        if let (true, Some(g)) = (trains_embedding, gradient) {
            let y = self.decoder.embed(self.input, self.pass.hook).map_err(&action)?;
            let gradients = continue_backward(&y, &g).map_err(&action)?;
            take(&gradients).map_err(&action)?;
        }
        Ok(())
    }
}

/// The gradients of what `y` was computed from, given the gradient of `y`.
fn continue_backward(y: &Tensor, gradient: &Tensor) -> candle_core::Result<ops::Gradients> {
    ops::backward(&(y * gradient)?.sum_all()?)
}
