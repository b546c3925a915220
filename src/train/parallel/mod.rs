//! Data-parallel training: every process runs a part of each step's micro-batches, and the gradients are summed.
//!
//! ```text
//! launch.rs   which process am I: torchrun, mpirun, srun
//! group.rs    the processes joined over TCP: sums, broadcasts, agreement
//! nccl.rs     gradients on GPUs, with the feature `nccl`
//! ```
//!
//! Only gradients of what is trained travel. With `W` processes and `G` micro-batches each (`gradient_accumulation`), a step
//! is that of one process with `G·W` micro-batches; with `G = 1` its sums are taken in the same order too, and the run ends
//! in the same bytes.

mod group;
mod launch;
#[cfg(feature = "nccl")]
mod nccl;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};

use super::{Error, Result};

pub use group::Group;
pub use launch::Launch;

/// Sums gradients over the processes; a gradient that no process has stays away.
///
/// # Errors
/// When a process has gone, or candle fails.
pub(super) fn sum_gradients(
    group: &Group,
    vars: &BTreeMap<String, Var>,
    gradients: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let failed = Error::candle("adding the gradients of all processes");
    let mut found: Vec<f64> = vars.keys().map(|name| f64::from(u8::from(gradients.contains_key(name)))).collect();
    group.sum_f64(&mut found)?;
    #[cfg(feature = "nccl")]
    if let Some(device) = vars.values().map(|var| var.device()).find(|device| device.is_cuda()) {
        let names: Vec<&String> =
            vars.keys().zip(&found).filter(|(_, count)| **count > 0.0).map(|(name, _)| name).collect();
        return sum_on_gpus(group.ring(device)?, &names, vars, gradients).map_err(failed);
    }
    let wanted = || vars.iter().zip(&found).filter(|(_, count)| **count > 0.0).map(|(var, _)| var);
    let mut values: Vec<f32> = Vec::with_capacity(wanted().map(|(_, var)| var.elem_count()).sum());
    for (name, var) in wanted() {
        match gradients.get(name) {
            Some(gradient) => values.extend(
                gradient
                    .to_dtype(DType::F32)
                    .and_then(|g| g.flatten_all())
                    .and_then(|g| g.to_vec1::<f32>())
                    .map_err(&failed)?,
            ),
            None => values.resize(values.len() + var.elem_count(), 0.0),
        }
    }
    group.sum_f32(&mut values)?;
    let mut rest = values.as_slice();
    for (name, var) in wanted() {
        let (own, more) = rest.split_at(var.elem_count());
        rest = more;
        gradients.insert(name.clone(), Tensor::from_slice(own, var.shape(), var.device()).map_err(&failed)?);
    }
    Ok(())
}

/// The same of gradients on GPUs, joined to one so that one sum does.
#[cfg(feature = "nccl")]
fn sum_on_gpus(
    ring: &nccl::Ring,
    names: &[&String],
    vars: &BTreeMap<String, Var>,
    gradients: &mut BTreeMap<String, Tensor>,
) -> candle_core::Result<()> {
    let wanted = || names.iter().filter_map(|name| vars.get_key_value(*name));
    let flat = wanted().map(|(name, var)| match gradients.get(name) {
        Some(gradient) => gradient.to_dtype(DType::F32)?.flatten_all(),
        None => Tensor::zeros(var.elem_count(), DType::F32, var.device()),
    });
    let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
    if flat.is_empty() {
        return Ok(());
    }
    // a copy even of one: what is summed in place is no gradient that something else still reads
    let all = Tensor::cat(&flat, 0)?.copy()?;
    ring.sum(&all)?;
    let mut start = 0;
    for (name, var) in wanted() {
        let count = var.elem_count();
        gradients.insert(name.clone(), all.narrow(0, start, count)?.reshape(var.shape())?);
        start += count;
    }
    Ok(())
}
