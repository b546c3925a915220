//! Numbers and gradient checks for the operations' tests.

use candle_core::{Device, Result, Tensor, Var};

/// Deterministic numbers in about [-1, 1].
pub(super) fn numbers(shape: &[usize], seed: f64) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|i| (seed + i as f64 * 1.618_033).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The gradient of Σ f(x)·c against central differences in float64.
pub(super) fn check_gradient(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
    let var = Var::from_tensor(x).unwrap();
    let y = f(var.as_tensor()).unwrap();
    let c = numbers(y.dims(), 0.3);
    let loss = |y: &Tensor| (y * &c).unwrap().sum_all().unwrap();
    let grads = loss(&y).backward().unwrap();
    let analytic: Vec<f64> = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let values: Vec<f64> = x.flatten_all().unwrap().to_vec1().unwrap();
    let step = 1e-6;
    for (i, found) in analytic.iter().enumerate() {
        let at = |delta: f64| {
            let mut moved = values.clone();
            moved[i] += delta;
            let x = Tensor::from_vec(moved, x.dims(), &Device::Cpu).unwrap();
            loss(&f(&x).unwrap()).to_scalar::<f64>().unwrap()
        };
        let expected = (at(step) - at(-step)) / (2.0 * step);
        assert!((found - expected).abs() < 1e-8 * (1.0 + expected.abs()), "element {i}: {found} vs {expected}");
    }
}

pub(super) fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}
