//! The model with its products summed in order: how far rounding alone takes a runtime that does not sum by blocks.
//!
//! A runtime may add the terms of a dot product one after the other, and is then as faithful as candle, which sums blocks, while its
//! rounding is several times larger. How much of that reaches the logits depends on the model and on the token: massive activations and
//! strong adapters magnify it, a hundredfold at one position and not at the next. So it is measured: the linear maps of every layer are
//! computed once more, each output with one accumulator that takes its terms in order. One order may come out near the reference
//! by luck, so there are four ([`SumOrder`]).

use candle_core::{DType, Result as CandleResult, Tensor};
use ndarray::Array2;
use rayon::prelude::*;

use super::{Model, Reference, Result};
use crate::base::{LinearMap, Site, SiteHook};

/// Outputs that are summed side by side.
const LANES: usize = 32;

/// An order in which one accumulator takes the terms of a dot product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumOrder {
    /// From the first to the last.
    Forward,
    /// From the last to the first.
    Backward,
    /// From the middle to the last, then from the first.
    ForwardFromMiddle,
    /// From the middle to the first, then from the last.
    BackwardFromMiddle,
}

impl SumOrder {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Forward, Self::Backward, Self::ForwardFromMiddle, Self::BackwardFromMiddle];

    /// The numbers of `width` terms.
    fn terms(self, width: usize) -> impl Iterator<Item = usize> {
        let middle = width / 2;
        let (first, rest) = match self {
            Self::Forward | Self::Backward => (0..width, 0..0),
            Self::ForwardFromMiddle => (middle..width, 0..middle),
            Self::BackwardFromMiddle => (0..middle, middle..width),
        };
        let backward = matches!(self, Self::Backward | Self::BackwardFromMiddle);
        let turned = move |range: std::ops::Range<usize>| {
            let last = range.start.saturating_add(range.end).saturating_sub(1);
            range.map(move |term| if backward { last.saturating_sub(term) } else { term })
        };
        turned(first).chain(turned(rest))
    }
}

/// A model's hook, with the model's linear maps summed in order.
struct InOrder<'a> {
    inner: &'a dyn SiteHook,
    order: SumOrder,
}

impl Reference {
    /// The logits of the same models in some cases, by number, with the products of their linear maps summed in order; float32 models
    /// only: half types are rounded after each product, and that counts more.
    ///
    /// # Errors
    /// When a model is another one, or fails.
    pub fn in_order(&self, models: &[Model<'_>], order: SumOrder, cases: &[usize]) -> Result<Vec<Array2<f64>>> {
        let hooks: Vec<InOrder> = models.iter().map(|model| InOrder { inner: model.hook, order }).collect();
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
        let output = product(map, self.order)?;
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
fn product(map: &LinearMap, order: SumOrder) -> CandleResult<Tensor> {
    let values = |tensor: &Tensor| tensor.contiguous()?.flatten_all()?.to_vec1::<f32>();
    let (input, weight) = (values(map.input)?, values(map.weight)?);
    let (batch, seq, width) = map.input.dims3()?;
    let outputs = map.weight.dim(0)?;
    let mut sums = vec![0f32; batch * seq * outputs];
    let terms: Vec<usize> = order.terms(width).collect();
    let blocks: Vec<Vec<f32>> = weight.par_chunks(width * LANES).map(|block| summed(&input, block, &terms)).collect();
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

/// `[rows, outputs]` of at most [`LANES`] rows of a matrix, `[outputs, width]`, the terms by number in the order of their sum.
fn summed(input: &[f32], weight: &[f32], terms: &[usize]) -> Vec<f32> {
    let width = terms.len();
    let mut turned = vec![[0f32; LANES]; width];
    for (lane, row) in weight.chunks_exact(width).enumerate() {
        for (column, weight) in turned.iter_mut().zip(row) {
            column[lane] = *weight;
        }
    }
    let lanes = weight.len() / width;
    let rows = input.chunks_exact(width).flat_map(|row| {
        let mut sums = [0f32; LANES];
        for term in terms {
            let (Some(x), Some(column)) = (row.get(*term), turned.get(*term)) else { continue };
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
        for (order, terms) in [
            (SumOrder::Forward, (0..70).collect::<Vec<_>>()),
            (SumOrder::Backward, (0..70).rev().collect()),
            (SumOrder::ForwardFromMiddle, (35..70).chain(0..35).collect()),
            (SumOrder::BackwardFromMiddle, (0..35).rev().chain((35..70).rev()).collect()),
        ] {
            let found = product(&map, order).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (row, x) in input.chunks_exact(width).enumerate() {
                for (at, w) in weight.chunks_exact(width).enumerate() {
                    let sum = terms.iter().fold(0f32, |sum, term| sum + x[*term] * w[*term]);
                    assert_eq!(found[row * 45 + at].to_bits(), (sum + bias[at]).to_bits(), "{order:?}, {row}, {at}");
                }
            }
        }
        let mut ones = vec![1f32; width];
        ones[0] = 16_777_216.0;
        let sum = |order: SumOrder| summed(&ones, &vec![1f32; width], &order.terms(width).collect::<Vec<_>>());
        assert_eq!(sum(SumOrder::Forward), [16_777_216.0]);
        assert_eq!(sum(SumOrder::Backward), [16_777_284.0]);
    }

    #[test]
    fn every_order_takes_every_term_once() {
        for (width, order) in [0, 1, 2, 7].into_iter().flat_map(|width| SumOrder::ALL.map(|order| (width, order))) {
            let mut terms: Vec<usize> = order.terms(width).collect();
            terms.sort_unstable();
            assert_eq!(terms, (0..width).collect::<Vec<_>>(), "{order:?}");
        }
    }
}
