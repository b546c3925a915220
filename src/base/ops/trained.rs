//! Trained tensors that an operation reads beside its inputs.
//!
//! candle's operations have three inputs at most, and what they return for one is added to zeros. An operation with more to
//! train has one input more, a single number that depends on all of it: on the way back it leaves the gradients with that
//! number, whose own backward hands them on. Under [`backward`] a variable's gradients are summed where the first of them
//! lies, so that none exists twice.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, TensorId, WithDType};
use rayon::prelude::*;

use super::held::tensor;
use super::real::Real;

type Gradients = Arc<Mutex<HashMap<TensorId, CpuStorage>>>;

/// What of an operation's tensors is trained.
#[derive(Debug, Default)]
pub(super) struct Trained {
    /// The number that depends on all of it; none where nothing is trained.
    token: Option<Tensor>,
    gradients: Gradients,
}

impl Trained {
    /// Of these tensors, those that are tracked.
    pub(super) fn of<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Self> {
        let gradients = Gradients::default();
        let mut token: Option<Tensor> = None;
        for trained in tensors.into_iter().filter(|tensor| tensor.track_op()) {
            let link = Link { gradients: gradients.clone() };
            token = Some(match token {
                Some(token) => token.apply_op2(trained, link)?,
                None => trained.apply_op1(link)?,
            });
        }
        Ok(Self { token, gradients })
    }

    /// What the operation takes as its last input.
    pub(super) fn token(&self) -> Option<&Tensor> {
        self.token.as_ref()
    }

    /// The number again, with no gradient: what the operation's backward returns for it.
    pub(super) fn no_gradient(&self) -> Result<Option<Tensor>> {
        self.token.as_ref().map(Tensor::zeros_like).transpose()
    }

    /// Leaves the gradient of one of the tensors; a second one of the same is added.
    pub(super) fn leave<T: Real + WithDType>(&self, of: &Tensor, gradient: Vec<T>) -> Result<()> {
        let mut gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        let gradient = T::to_cpu_storage_owned(gradient);
        match gradients.get_mut(&of.id()) {
            Some(so_far) => sum(so_far, &gradient),
            None => {
                gradients.insert(of.id(), gradient);
                Ok(())
            }
        }
    }
}

/// `sum += other`.
fn sum(sum: &mut CpuStorage, other: &CpuStorage) -> Result<()> {
    fn add<T: Real>(sum: &mut [T], other: &[T]) {
        sum.par_iter_mut().zip(other).with_min_len(1 << 13).for_each(|(a, b)| *a += *b);
    }
    match (sum, other) {
        (CpuStorage::F32(sum), CpuStorage::F32(other)) => add(sum, other),
        (CpuStorage::F64(sum), CpuStorage::F64(other)) => add(sum, other),
        _ => candle_core::bail!("gradients of one tensor have several types"),
    }
    Ok(())
}

fn to_tensor(storage: CpuStorage, shape: &Shape) -> Result<Tensor> {
    match storage {
        CpuStorage::F32(values) => tensor(values, shape),
        CpuStorage::F64(values) => tensor(values, shape),
        _ => candle_core::bail!("a gradient is neither float32 nor float64"),
    }
}

thread_local! {
    /// Gradients of variables in the [`backward`] that runs on this thread.
    static VARIABLES: RefCell<Option<Variables>> = const { RefCell::new(None) };
}

type Variables = HashMap<TensorId, (CpuStorage, Shape)>;

/// `loss.backward()` with no more than one gradient of each trained weight at a time.
///
/// # Errors
/// Those of candle.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    VARIABLES.set(Some(HashMap::new()));
    let store = loss.backward();
    let variables = VARIABLES.take().unwrap_or_default();
    let mut store = store?;
    for (id, (gradient, shape)) in variables {
        let gradient = to_tensor(gradient, &shape)?;
        // where an operation of candle's reads the variable too
        let sum = match store.get_id(id) {
            Some(other) => (gradient + other)?.detach(),
            None => gradient,
        };
        store.insert_id(id, sum);
    }
    Ok(store)
}

/// Adds to a variable's gradient in the [`backward`] that runs; gives false where none does.
pub(super) fn gather<T: Real + WithDType>(of: &Tensor, join: impl FnOnce(&mut [T])) -> Result<bool> {
    VARIABLES.with_borrow_mut(|variables| {
        let Some(variables) = variables.as_mut().filter(|_| of.is_variable()) else { return Ok(false) };
        let (sum, _) = variables
            .entry(of.id())
            .or_insert_with(|| (T::to_cpu_storage_owned(vec![T::zero(); of.elem_count()]), of.shape().clone()));
        let Some(sum) = T::of_storage(sum) else { candle_core::bail!("gradients of one tensor have several types") };
        join(sum);
        Ok(true)
    })
}

/// One of the tensors that a token depends on.
struct Link {
    gradients: Gradients,
}

impl Link {
    /// The tensor's gradient, where no [`backward`] takes it.
    fn hand_on(&self, of: &Tensor) -> Result<Option<Tensor>> {
        let left = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).remove(&of.id());
        let Some(gradient) = left else { candle_core::bail!("an operation left no gradient of {:?}", of.shape()) };
        let rest = VARIABLES.with_borrow_mut(|variables| {
            let Some(variables) = variables.as_mut().filter(|_| of.is_variable()) else { return Ok(Some(gradient)) };
            match variables.get_mut(&of.id()) {
                Some((so_far, _)) => sum(so_far, &gradient)?,
                None => {
                    variables.insert(of.id(), (gradient, of.shape().clone()));
                }
            }
            Ok::<_, candle_core::Error>(None)
        })?;
        rest.map(|gradient| to_tensor(gradient, of.shape())).transpose()
    }
}

/// A token says nothing but where it comes from.
fn token() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), 1.into())
}

impl CustomOp1 for Link {
    fn name(&self) -> &'static str {
        "trained"
    }

    fn cpu_fwd(&self, _of: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token())
    }

    fn bwd(&self, of: &Tensor, _token: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        self.hand_on(of)
    }
}

impl CustomOp2 for Link {
    fn name(&self) -> &'static str {
        "trained"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _of: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token())
    }

    fn bwd(&self, _: &Tensor, of: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), self.hand_on(of)?))
    }
}
