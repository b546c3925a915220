//! Cross-entropy of rows of logits, summed by group.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `Σ_r logsumexp(logits_r) − logits_r[target_r]` over the rows r of `[rows, vocab]` that belong to a group: `[groups]`, in
/// the logits' float32 or float64. The sums are gathered in float64 in the order of the rows.
#[derive(Clone)]
pub(super) struct CrossEntropy {
    /// The label of each row.
    pub(super) targets: Vec<u32>,
    /// The group of each row, below `groups`.
    pub(super) group_of: Vec<u32>,
    /// Number of groups.
    pub(super) groups: usize,
}

trait Logit: num_traits::Float + Send + Sync {
    fn wide(self) -> f64;
}

impl Logit for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Logit for f64 {
    fn wide(self) -> f64 {
        self
    }
}

/// `(max, Σ exp(x − max))`, the sum gathered in float64.
fn log_sum_parts<T: Logit>(row: &[T]) -> (T, f64) {
    let max = row.iter().copied().fold(T::neg_infinity(), T::max);
    (max, row.iter().map(|x| (*x - max).exp().wide()).sum())
}

impl CrossEntropy {
    fn losses<T: Logit>(&self, logits: &[T]) -> Vec<f64> {
        let width = logits.len() / self.targets.len().max(1);
        let rows: Vec<f64> = logits
            .par_chunks(width.max(1))
            .zip(&self.targets)
            .map(|(row, target)| {
                let (max, sum) = log_sum_parts(row);
                max.wide() + sum.ln() - row[*target as usize].wide()
            })
            .collect();
        // a fixed order of summation, whatever the threads did
        let mut sums = vec![0.0; self.groups];
        for (loss, group) in rows.iter().zip(&self.group_of) {
            sums[*group as usize] += loss;
        }
        sums
    }

    /// `(softmax(logits_r) − onehot(target_r)) · scale[group of r]`.
    fn gradient<T: Logit>(&self, logits: &[T], scales: &[T]) -> Vec<T> {
        let width = (logits.len() / self.targets.len().max(1)).max(1);
        let mut gradient = vec![T::zero(); logits.len()];
        let labels = self.targets.par_iter().zip(&self.group_of);
        let rows = gradient.par_chunks_mut(width).zip(logits.par_chunks(width)).zip(labels);
        rows.for_each(|((gradient, row), (target, group))| {
            let scale = scales[*group as usize];
            let (max, sum) = log_sum_parts(row);
            let factor = scale / T::from(sum).unwrap_or_else(T::nan);
            for (g, x) in gradient.iter_mut().zip(row) {
                *g = (*x - max).exp() * factor;
            }
            let target = &mut gradient[*target as usize];
            *target = *target - scale;
        });
        gradient
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("cross-entropy was given strided logits")
        };
        let storage = match logits {
            CpuStorage::F32(v) => {
                CpuStorage::F32(self.losses(&v[start..end]).into_iter().map(|loss| loss as f32).collect())
            }
            CpuStorage::F64(v) => CpuStorage::F64(self.losses(&v[start..end])),
            other => candle_core::bail!("cross-entropy was given {:?}", other.dtype()),
        };
        Ok((storage, Shape::from(self.groups)))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        logits.apply_op2_no_bwd(&grad.contiguous()?, &CrossEntropyGrad(self.clone())).map(Some)
    }
}

struct CrossEntropyGrad(CrossEntropy);

impl CustomOp2 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross-entropy-grad"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, ll: &Layout, grad: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = ll.contiguous_offsets() else {
            candle_core::bail!("cross-entropy was given strided logits")
        };
        let at = lg.start_offset()..lg.start_offset() + self.0.groups;
        let storage = match (logits, grad) {
            (CpuStorage::F32(v), CpuStorage::F32(g)) => CpuStorage::F32(self.0.gradient(&v[start..end], &g[at])),
            (CpuStorage::F64(v), CpuStorage::F64(g)) => CpuStorage::F64(self.0.gradient(&v[start..end], &g[at])),
            _ => candle_core::bail!("cross-entropy's gradient was given mixed types"),
        };
        Ok((storage, ll.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn one_group(targets: &[u32]) -> CrossEntropy {
        CrossEntropy { targets: targets.to_vec(), group_of: vec![0; targets.len()], groups: 1 }
    }

    #[test]
    fn cross_entropy_is_candle_nn_s_with_the_same_gradient() {
        let values: Vec<f64> = (0..24).map(|i| (i as f64 * 1.3).sin() * 4.0).collect();
        let logits = Var::from_tensor(&Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap()).unwrap();
        let targets = vec![0u32, 5, 2, 2];
        let ours = logits.as_tensor().apply_op1(one_group(&targets)).unwrap().squeeze(0).unwrap();
        let theirs =
            candle_nn::loss::cross_entropy(logits.as_tensor(), &Tensor::new(targets, &Device::Cpu).unwrap()).unwrap();
        let value = |t: &Tensor| t.to_scalar::<f64>().unwrap();
        assert!((value(&ours) / 4.0 - value(&theirs)).abs() < 1e-12);
        let gradient = |loss: &Tensor| {
            let grads = loss.backward().unwrap();
            grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        for (a, b) in gradient(&ours).iter().zip(gradient(&theirs)) {
            assert!((a / 4.0 - b).abs() < 1e-12);
        }
    }
}
