//! Rows of a table by number.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};

use super::held::{Held, is_held, numbers};
use super::real::Real;
use super::trained::{RowGradient, gather};

/// Rows of `table`, `[rows, width]` → `[ids, width]`.
///
/// # Errors
/// When an id is no row.
pub fn lookup(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    match table.track_op() && is_held(table) {
        true => table.apply_op1(Lookup { ids: ids.to_vec() }),
        false => table.index_select(&Tensor::new(ids, table.device())?, 0),
    }
}

struct Lookup {
    ids: Vec<u32>,
}

impl Lookup {
    fn rows<T: Real + WithDType>(&self, table: &[T], width: usize) -> Result<Vec<T>> {
        let mut out = Vec::with_capacity(self.ids.len() * width);
        for id in &self.ids {
            let start = *id as usize * width;
            match table.get(start..start + width) {
                Some(row) => out.extend_from_slice(row),
                None => candle_core::bail!("lookup: there is no row {id}"),
            }
        }
        Ok(out)
    }

    fn gradient<T: Real + WithDType>(&self, table: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let held = Held::of(grad)?;
        let rows = RowGradient::new(table, &self.ids, held.numbers::<T>()?);
        let Some(rows) = gather(table, rows) else { return Ok(None) };
        let sum = table.zeros_like()?;
        rows.add_to(&sum)?;
        Ok(Some(sum))
    }
}

impl CustomOp1 for Lookup {
    fn name(&self) -> &'static str {
        "lookup"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let rows = match table {
            CpuStorage::F32(_) => CpuStorage::F32(self.rows(numbers(table, layout)?, width)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.rows(numbers(table, layout)?, width)?),
            _ => candle_core::bail!("lookup: the table is neither float32 nor float64"),
        };
        Ok((rows, (self.ids.len(), width).into()))
    }

    fn bwd(&self, table: &Tensor, _rows: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        match table.dtype() {
            DType::F64 => self.gradient::<f64>(table, &grad),
            _ => self.gradient::<f32>(table, &grad),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::super::{Gradients, backward, linear};
    use super::*;

    #[test]
    fn rows_come_back_with_an_exact_gradient_that_joins_that_of_a_tied_head() {
        let (table, ids) = (numbers(&[5, 3], 0.0), [4, 0, 4]);
        check_gradient(&table, |table| lookup(table, &ids));
        let var = Var::from_tensor(&table).unwrap();
        let tied = |table: &Tensor| linear(&lookup(table, &ids)?, table, None);
        check_gradient(&table, tied);
        // what is found of a table in any of the two forms
        let found = |gradients: &Gradients, var: &Var| {
            let sum = gradients.store.get(var).map_or_else(|| var.zeros_like().unwrap(), |sum| sum.copy().unwrap());
            gradients.rows.iter().filter(|rows| rows.is_of(var)).for_each(|rows| rows.add_to(&sum).unwrap());
            sum
        };
        let loss = || tied(var.as_tensor()).unwrap().sqr().unwrap().sum_all().unwrap();
        let (plain, gathered) = (loss().backward().unwrap(), backward(&loss()).unwrap());
        assert!(max_difference(plain.get(&var).unwrap(), &found(&gathered, &var)) < 1e-13);
        // where candle's own operations read the variable too
        let both = || (loss() + var.as_tensor().sqr().unwrap().sum_all().unwrap()).unwrap();
        let (plain, gathered) = (both().backward().unwrap(), backward(&both()).unwrap());
        assert!(max_difference(plain.get(&var).unwrap(), &found(&gathered, &var)) < 1e-13);
        // where nothing but the lookup reads it
        let alone = || lookup(var.as_tensor(), &ids).unwrap().sqr().unwrap().sum_all().unwrap();
        let (plain, gathered) = (alone().backward().unwrap(), backward(&alone()).unwrap());
        assert!(gathered.store.get(&var).is_none() && gathered.rows.len() == 1);
        assert!(max_difference(plain.get(&var).unwrap(), &found(&gathered, &var)) < 1e-13);
        assert!(lookup(var.as_tensor(), &[5]).is_err());
    }
}
