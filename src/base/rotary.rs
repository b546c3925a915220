//! Rotary position embedding (arXiv 2104.09864) with the scaling rules of transformers' `modeling_rope_utils`.

use std::borrow::Cow;

use super::{LongContext, spec};

/// How frequencies are stretched for contexts beyond the pretrained one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    /// As pretrained.
    Default,
    /// Every frequency divided by a factor.
    Linear { factor: f64 },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_positions: f64 },
    /// Each frequency divided by its own factor, as GGUF files store a scaling rule.
    Factors(Vec<f32>),
}

impl spec::Rotary {
    /// Frequencies `theta^(-2i/dim)`, scaled. Rounded to float32 where transformers rounds.
    pub(super) fn new(dim: usize, theta: f64, scaling: &Scaling) -> Self {
        let base = plain(dim, theta);
        let inv_freq = match scaling {
            Scaling::Default => base.collect(),
            Scaling::Linear { factor } => base.map(|f| f / *factor as f32).collect(),
            Scaling::Factors(factors) => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                base.map(|f| llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_positions)).collect()
            }
        };
        Self { dim, interleaved: false, inv_freq, attention_factor: 1.0, long: LongContext::Same }
    }
}

/// `theta^(-2i/dim)` in float32.
fn plain(dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim as f32))
}

fn llama3(frequency: f32, factor: f64, low: f64, high: f64, original: f64) -> f32 {
    let wavelength = std::f64::consts::TAU / f64::from(frequency);
    if wavelength < original / high {
        return frequency;
    }
    if wavelength > original / low {
        return (f64::from(frequency) / factor) as f32;
    }
    let smooth = (original / wavelength - low) / (high - low);
    ((1.0 - smooth) * f64::from(frequency) / factor + smooth * f64::from(frequency)) as f32
}

impl spec::Rotary {
    /// Cosines and sines of the angles of `positions` times [`attention_factor`](Self::attention_factor), position by
    /// position, `dim / 2` each. Angles are the float32 product of position and frequency, as in transformers whatever the
    /// model's dtype; cosine and sine are taken in float64.
    pub fn cos_sin(&self, positions: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let length = positions.iter().max().map_or(0, |last| *last as usize + 1);
        let frequencies = self.frequencies(length);
        let angles = positions.iter().flat_map(|p| frequencies.iter().map(move |f| f64::from(*p as f32 * f)));
        angles.map(|angle| (angle.cos() * self.attention_factor, angle.sin() * self.attention_factor)).unzip()
    }

    /// The frequencies of a pass that uses `length` positions.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match &self.long {
            LongContext::Switched { original, inv_freq } if length > *original => Cow::Borrowed(inv_freq),
            LongContext::Ntk { original, theta, factor } if length > *original => {
                let (dim, ratio) = (self.dim as f64, length as f64 / *original as f64);
                let theta = theta * (factor * ratio - (factor - 1.0)).powf(dim / (dim - 2.0));
                Cow::Owned(plain(self.dim, theta).collect())
            }
            _ => Cow::Borrowed(&self.inv_freq),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::Rotary;

    /// Frequencies of transformers' `_compute_llama3_parameters` for Llama 3.1 (theta 500000, dim 128, factor 8, low 1,
    /// high 4, 8192 positions), at one index of each regime, computed there in float64.
    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192.0,
        };
        let plain = Rotary::new(128, 500_000.0, &Scaling::Default).inv_freq;
        let scaled = Rotary::new(128, 500_000.0, &scaling).inv_freq;
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[20], scaled[20]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        // index 32: wavelength 2π·√500000 = 4442.9 lies between 2048 and 8192; smooth = (8192/4442.9 - 1)/3 = 0.28127
        let smooth = (8192.0 / 4_442.882_938_158_366 - 1.0) / 3.0;
        let expected = ((1.0 - smooth) / 8.0 + smooth) / 500_000f64.sqrt();
        assert!((f64::from(scaled[32]) / expected - 1.0).abs() < 1e-6);
    }

    #[test]
    fn angles_are_float32_products() {
        let rotary = Rotary { inv_freq: vec![0.1], ..Rotary::new(2, 1.0, &Scaling::Default) };
        let (cos, _) = rotary.cos_sin(&[8191]);
        assert_eq!(cos[0], f64::from(8191f32 * 0.1f32).cos());
    }
}
