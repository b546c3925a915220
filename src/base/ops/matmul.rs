//! Matrix products of slices.

use gemm::Parallelism;

use super::real::Real;

/// A matrix in a slice: element `(i, j)` at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows` of `columns` elements, one after the other.
    pub(super) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// `rows` of `columns` elements, which begin `row_stride` apart.
    pub(super) fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// How many rows it has.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// A row of a matrix that is not transposed.
    pub(super) fn row(&self, index: usize) -> &'a [T] {
        &self.data[index * self.row_stride..][..self.columns]
    }

    /// The transposed matrix.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Where a product goes: rows that begin `row_stride` apart.
#[derive(Debug)]
pub(super) struct Target<'a, T> {
    data: &'a mut [T],
    row_stride: usize,
}

impl<'a, T> Target<'a, T> {
    pub(super) fn strided(data: &'a mut [T], row_stride: usize) -> Self {
        Self { data, row_stride }
    }
}

/// On how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// This one.
    One,
    /// All of the pool.
    All,
}

/// `target = keep · target + scale · (a · b)`; with `keep` false the target is not read.
///
/// # Panics
/// When the shapes do not fit each other or their slices: a mistake of the caller's.
pub(super) fn multiply<T: Real>(target: Target<T>, keep: bool, scale: T, a: Matrix<T>, b: Matrix<T>, threads: Threads) {
    let last = |rows: usize, columns: usize, row: usize, column: usize| {
        if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row + (columns - 1) * column + 1 }
    };
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    assert!(last(m, k, a.row_stride, a.column_stride) <= a.data.len(), "the left matrix is larger than its slice");
    assert!(last(k, n, b.row_stride, b.column_stride) <= b.data.len(), "the right matrix is larger than its slice");
    assert!(last(m, n, target.row_stride, 1) <= target.data.len(), "the target is larger than its slice");
    assert!(m <= 1 || target.row_stride >= n, "the target's rows overlap");
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: every element that the strides reach lies in its slice (checked above); the target is borrowed mutably and its
    // rows do not overlap; `Real` is f32 and f64, which gemm knows.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            target.data.as_mut_ptr(),
            1,
            target.row_stride as isize,
            keep,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition, with strides, transposes, sums and factors.
    #[test]
    fn products_are_the_definition() {
        let numbers = |n: usize, seed: f64| (0..n).map(|i| (seed + i as f64 * 1.7).sin()).collect::<Vec<f64>>();
        let (m, n, k) = (5, 7, 3);
        let (a, b) = (numbers(m * 4, 0.1), numbers(n * 9, 0.2));
        for (keep, threads) in [(false, Threads::One), (true, Threads::All)] {
            let before = numbers(m * 8, 0.3);
            let mut found = before.clone();
            let right = Matrix::strided(&b, n, k, 9).t();
            multiply(Target::strided(&mut found, 8), keep, 0.5, Matrix::strided(&a, m, k, 4), right, threads);
            for row in 0..m {
                for column in 0..8 {
                    let at = row * 8 + column;
                    let dot: f64 = (0..k).map(|i| a[row * 4 + i] * b[column.min(6) * 9 + i]).sum();
                    let expected = match column {
                        7 => before[at],
                        _ => 0.5 * dot + if keep { before[at] } else { 0.0 },
                    };
                    assert!((found[at] - expected).abs() < 1e-14, "{row}, {column}");
                }
            }
        }
    }

    #[test]
    #[should_panic = "the right matrix is larger than its slice"]
    fn a_matrix_beyond_its_slice_is_refused() {
        let mut target = [0f32; 4];
        let (a, b) = ([1f32; 4], [1f32; 3]);
        let (a, b) = (Matrix::new(&a, 2, 2), Matrix::new(&b, 2, 2));
        multiply(Target::strided(&mut target, 2), false, 1.0, a, b, Threads::One);
    }
}
