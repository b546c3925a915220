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
use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp1, Layout, Result, Shape, Tensor, TensorId, WithDType};
use rayon::prelude::*;

use super::held::tensor;
use super::real::Real;

type Left = Arc<Mutex<HashMap<TensorId, CpuStorage>>>;

/// What of an operation's tensors is trained.
#[derive(Debug, Default)]
pub(super) struct Trained {
    /// The number that depends on all of it; none where nothing is trained.
    token: Option<Tensor>,
    gradients: Left,
}

impl Trained {
    /// Of these tensors, those that are tracked.
    pub(super) fn of<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Self> {
        let gradients = Left::default();
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

#[derive(Default)]
struct Variables {
    whole: HashMap<TensorId, (CpuStorage, Shape)>,
    rows: Vec<RowGradient>,
}

/// What a [`backward`] found.
pub struct Gradients {
    /// Gradients by tensor.
    pub store: GradStore,
    /// Gradients of tables that have none in the store.
    pub rows: Vec<RowGradient>,
}

/// The gradient of some rows of a table; that of the others is zero.
pub struct RowGradient {
    table: TensorId,
    /// Which rows; one that is named twice has the sum of both.
    ids: Vec<u32>,
    /// `[ids, width]`.
    gradient: CpuStorage,
}

impl RowGradient {
    pub(super) fn new<T: Real + WithDType>(table: &Tensor, ids: &[u32], gradient: &[T]) -> Self {
        Self { table: table.id(), ids: ids.to_vec(), gradient: T::to_cpu_storage_owned(gradient.to_vec()) }
    }

    /// Whether it is of this table.
    pub fn is_of(&self, table: &Tensor) -> bool {
        self.table == table.id()
    }

    /// Adds it to a contiguous tensor of the table's shape on the CPU, where that lies.
    ///
    /// # Errors
    /// When the tensor is another.
    pub fn add_to(&self, sum: &Tensor) -> Result<()> {
        sum.inplace_op1(self)
    }

    fn add<T: Real + WithDType>(&self, sum: &mut [T], width: usize) -> Result<()> {
        let gradient = T::cpu_storage_as_slice(&self.gradient)?;
        for (id, gradient) in self.ids.iter().zip(gradient.chunks_exact(width.max(1))) {
            let start = *id as usize * width;
            let Some(row) = sum.get_mut(start..start + width) else { candle_core::bail!("there is no row {id}") };
            row.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += *g);
        }
        Ok(())
    }

    fn add_to_storage(&self, sum: &mut CpuStorage, shape: &Shape) -> Result<()> {
        let (_, width) = shape.dims2()?;
        match sum {
            CpuStorage::F32(sum) => self.add(sum, width),
            CpuStorage::F64(sum) => self.add(sum, width),
            _ => candle_core::bail!("a gradient is neither float32 nor float64"),
        }
    }
}

impl InplaceOp1 for RowGradient {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match layout.contiguous_offsets() {
            Some((0, _)) => self.add_to_storage(sum, layout.shape()),
            _ => candle_core::bail!("add-rows: the sum is not contiguous"),
        }
    }
}

/// `loss.backward()` with no more than one gradient of each trained weight at a time.
///
/// # Errors
/// Those of candle.
pub fn backward(loss: &Tensor) -> Result<Gradients> {
    VARIABLES.set(Some(Variables::default()));
    let store = loss.backward();
    let Variables { mut whole, rows } = VARIABLES.take().unwrap_or_default();
    let mut store = store?;
    let mut rest = Vec::new();
    for rows in rows {
        match whole.get_mut(&rows.table) {
            Some((sum, shape)) => rows.add_to_storage(sum, shape)?,
            None => rest.push(rows),
        }
    }
    for (id, (gradient, shape)) in whole {
        let gradient = to_tensor(gradient, &shape)?;
        // where an operation of candle's reads the variable too
        let sum = match store.get_id(id) {
            Some(other) => (gradient + other)?.detach(),
            None => gradient,
        };
        store.insert_id(id, sum);
    }
    Ok(Gradients { store, rows: rest })
}

/// Gives a variable's gradient to the [`backward`] that runs; gives it back where none does.
pub(super) fn gather(of: &Tensor, rows: RowGradient) -> Option<RowGradient> {
    VARIABLES.with_borrow_mut(|variables| match variables.as_mut().filter(|_| of.is_variable()) {
        Some(variables) => {
            variables.rows.push(rows);
            None
        }
        None => Some(rows),
    })
}

/// One of the tensors that a token depends on.
struct Link {
    gradients: Left,
}

impl Link {
    /// The tensor's gradient, where no [`backward`] takes it.
    fn hand_on(&self, of: &Tensor) -> Result<Option<Tensor>> {
        let left = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).remove(&of.id());
        let Some(gradient) = left else { candle_core::bail!("an operation left no gradient of {:?}", of.shape()) };
        let rest = VARIABLES.with_borrow_mut(|variables| {
            let Some(variables) = variables.as_mut().filter(|_| of.is_variable()) else { return Ok(Some(gradient)) };
            match variables.whole.get_mut(&of.id()) {
                Some((so_far, _)) => sum(so_far, &gradient)?,
                None => {
                    variables.whole.insert(of.id(), (gradient, of.shape().clone()));
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
