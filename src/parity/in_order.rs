//! The model with its products summed in order: how far rounding alone takes a runtime that does not sum by blocks.
//!
//! A runtime may add the terms of a dot product one after the other, and is then as faithful as candle, which sums blocks, while its
//! rounding is several times larger. How much of that reaches the logits depends on the model: massive activations and strong
//! adapters magnify it. So it is measured: the linear maps of every layer are computed once more, each output with one accumulator
//! that takes its terms in order.

use candle_core::{DType, Result as CandleResult, Tensor};
use ndarray::Array2;
use rayon::prelude::*;

use super::{Model, Reference, Result};
use crate::base::{LinearMap, Site, SiteHook};

/// Outputs that are summed side by side.
const LANES: usize = 32;

/// A model's hook, with the model's linear maps summed in order.
struct InOrder<'a> {
    inner: &'a dyn SiteHook,
}

impl Reference {
    /// The logits of the same models in some cases, by number, with the products of their linear maps summed in order; float32 models
    /// only: half types are rounded after each product, and that counts more.
    ///
    /// # Errors
    /// When a model is another one, or fails.
    pub fn in_order(&self, models: &[Model<'_>], cases: &[usize]) -> Result<Vec<Array2<f64>>> {
        let hooks: Vec<InOrder> = models.iter().map(|model| InOrder { inner: model.hook }).collect();
        let models: Vec<Model> =
            models.iter().zip(&hooks).map(|(model, hook)| Model { decoder: model.decoder, hook }).collect();
        self.replay_numbered(&models, cases)
    }
}

impl SiteHook for InOrder<'_> {
    fn term(&self, site: &Site) -> CandleResult<Option<Tensor>> {
        self.inner.term(site)
    }

    fn linear(&self, map: &LinearMap) -> CandleResult<Option<Tensor>> {
        if map.input.dtype() != DType::F32 || map.weight.dtype() != DType::F32 {
            return self.inner.linear(map);
        }
        let output = product(map)?;
        let changed = self.inner.linear(&LinearMap { output: &output, ..*map })?;
        Ok(Some(changed.unwrap_or(output)))
    }

    fn prefix(&self, layer: usize) -> CandleResult<Option<(Tensor, Tensor)>> {
        self.inner.prefix(layer)
    }

    fn prefix_length(&self) -> usize {
        self.inner.prefix_length()
    }
}

/// `input · weightᵀ + bias`, `[batch, seq, out]`.
fn product(map: &LinearMap) -> CandleResult<Tensor> {
    let values = |tensor: &Tensor| tensor.contiguous()?.flatten_all()?.to_vec1::<f32>();
    let (input, weight) = (values(map.input)?, values(map.weight)?);
    let (batch, seq, width) = map.input.dims3()?;
    let outputs = map.weight.dim(0)?;
    let mut sums = vec![0f32; batch * seq * outputs];
    let blocks: Vec<Vec<f32>> = weight.par_chunks(width * LANES).map(|block| summed(&input, block, width)).collect();
    for (block, rows) in blocks.iter().enumerate() {
        let lanes = rows.len() / (batch * seq).max(1);
        for (row, found) in sums.chunks_exact_mut(outputs.max(1)).zip(rows.chunks_exact(lanes.max(1))) {
            row[block * LANES..block * LANES + lanes].copy_from_slice(found);
        }
    }
    let product = Tensor::from_vec(sums, (batch, seq, outputs), map.input.device())?;
    match map.bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// `[rows, outputs]` of at most [`LANES`] rows of a matrix, `[outputs, width]`.
fn summed(input: &[f32], weight: &[f32], width: usize) -> Vec<f32> {
    let mut turned = vec![[0f32; LANES]; width];
    for (lane, row) in weight.chunks_exact(width).enumerate() {
        for (column, weight) in turned.iter_mut().zip(row) {
            column[lane] = *weight;
        }
    }
    let lanes = weight.len() / width;
    let rows = input.chunks_exact(width).flat_map(|row| {
        let mut sums = [0f32; LANES];
        for (x, column) in row.iter().zip(&turned) {
            for (sum, weight) in sums.iter_mut().zip(column) {
                *sum += x * weight;
            }
        }
        sums.into_iter().take(lanes)
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::base::Linear;

    /// To the bit; and ones after 2²⁴ are lost, each for itself.
    #[test]
    fn each_output_has_one_accumulator_that_takes_its_terms_in_order() {
        let width = 70;
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 7.0 - 6.0;
        let input: Vec<f32> = (0..3 * width).map(value).collect();
        let weight: Vec<f32> = (0..45 * width).map(|i| value(i + 5)).collect();
        let bias: Vec<f32> = (0..45).map(value).collect();
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let (x, w, b) = (tensor(&input, &[1, 3, width]), tensor(&weight, &[45, width]), tensor(&bias, &[45]));
        let map = LinearMap { layer: 0, linear: Linear::Up, input: &x, weight: &w, bias: Some(&b), output: &x };
        let found = product(&map).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (row, x) in input.chunks_exact(width).enumerate() {
            for (at, w) in weight.chunks_exact(width).enumerate() {
                let mut sum = 0f32;
                for (x, w) in x.iter().zip(w) {
                    sum += x * w;
                }
                assert_eq!(found[row * 45 + at].to_bits(), (sum + bias[at]).to_bits(), "{row}, {at}");
            }
        }
        let mut ones = vec![1f32; width];
        ones[0] = 16_777_216.0;
        assert_eq!(summed(&ones, &vec![1f32; width], width), [16_777_216.0]);
    }
}
