//! The numbers that operations compute in, and loops that the processor's widest vectors run.

use num_traits::Float;

/// A float type to compute in.
pub(super) trait Real:
    Float + Send + Sync + std::iter::Sum + std::ops::AddAssign + std::fmt::Debug + 'static
{
    /// From float64, rounded.
    fn of(x: f64) -> Self;

    /// To float64.
    fn wide(self) -> f64;

    /// `exp(x)`; in float32 within two units in the last place, by operations that vectorise, and 0 below −87.
    fn fast_exp(self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as Self
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    /// `2ⁿ · exp(r)` with `n` the nearest integer to `x / ln 2` and `|r| ≤ ln 2 / 2`; `exp(r)` by its Taylor polynomial
    /// of degree 7, whose remainder is below 6e-9.
    #[inline(always)]
    fn fast_exp(self) -> Self {
        /// Adding it leaves the nearest integer in the low bits.
        const ROUND: f32 = 12_582_912.0;
        /// ln 2 in two parts; the first has few bits, so that its product with `n` is exact.
        const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
        let x = if self > 88.0 { 88.0 } else { self };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN_2.0 - n * LN_2.1;
        let mut sum = 1.0 / 5040.0;
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            sum = sum * r + coefficient;
        }
        let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
        let scale = Self::from_bits(exponent << 23);
        if x < -87.0 { 0.0 } else { sum * scale }
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn fast_exp(self) -> Self {
        self.exp()
    }
}

/// Runs `f` compiled for the processor's vector instructions; `f` and what it calls must be inlined.
#[inline(always)]
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// How many partial sums are kept: as many as the widest vectors hold, twice.
const LANES: usize = 32;

/// `Σ f(a, b)` in lanes, which vectorises and rounds less than in order. Slices of equal length.
#[inline(always)]
pub(super) fn sum_pairs<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(*a, *b);
        }
    }
    let rest: T = a.remainder().iter().zip(b.remainder()).map(|(a, b)| f(*a, *b)).sum();
    fold_lanes(lanes, |a, b| a + b) + rest
}

/// `Σ f(a)` in lanes.
#[inline(always)]
pub(super) fn sum<T: Real>(a: &[T], f: impl Fn(T) -> T) -> T {
    sum_pairs(a, a, |a, _| f(a))
}

/// The largest element, in lanes; minus infinity of none.
#[inline(always)]
pub(super) fn max<T: Real>(a: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::neg_infinity(); LANES];
    let mut chunks = a.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, a) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *a);
        }
    }
    let rest = chunks.remainder().iter().copied().fold(T::neg_infinity(), larger);
    larger(fold_lanes(lanes, larger), rest)
}

/// Halves the lanes until one is left.
#[inline(always)]
fn fold_lanes<T: Real>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low = f(*low, *high);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            worst = worst.max((f64::from(x.fast_exp()) - exact).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
        assert_eq!((-100f32).fast_exp(), 0.0);
        assert_eq!(f32::NEG_INFINITY.fast_exp(), 0.0);
        assert_eq!(0f32.fast_exp(), 1.0);
        assert!(f32::NAN.fast_exp().is_nan());
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for length in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f64> = (0..length).map(f64::from).collect();
            let expected = f64::from(length * (length - 1) / 2);
            assert_eq!(vectorised(|| sum(&a, |x| x)), expected);
            assert_eq!(vectorised(|| max(&a)), if length == 0 { f64::NEG_INFINITY } else { f64::from(length - 1) });
        }
    }
}
