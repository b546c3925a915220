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
    /// A base that grows with the sequence.
    Dynamic { factor: f64, original: usize },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_positions: f64 },
    /// arXiv 2309.00071.
    Yarn(Yarn),
    /// arXiv 2402.13753: each frequency divided by its own factor, others beyond the pretrained context.
    Longrope { short: Vec<f32>, long: Vec<f32>, factor: f64, original: usize, attention_factor: Option<f64> },
    /// Each frequency divided by its own factor, as GGUF files store a scaling rule.
    Factors(Vec<f32>),
}

/// YaRN: low frequencies divided by `factor`, high ones kept, a linear ramp between, and a factor on cosine and sine.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Yarn {
    pub(super) factor: f64,
    pub(super) original: f64,
    /// Pairs that turn more often than this in the pretrained context are kept.
    pub(super) beta_fast: f64,
    /// Pairs that turn less often than this are divided.
    pub(super) beta_slow: f64,
    /// Whether the ramp begins and ends at whole pairs.
    pub(super) truncate: bool,
    pub(super) attention_factor: Option<f64>,
    /// Zero where not given.
    pub(super) mscale: f64,
    pub(super) mscale_all_dim: f64,
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let scaled = |mscale: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 };
        self.attention_factor.unwrap_or_else(|| match (self.mscale, self.mscale_all_dim) {
            (mscale, all) if mscale != 0.0 && all != 0.0 => scaled(mscale) / scaled(all),
            _ => scaled(1.0),
        })
    }

    fn inv_freq(&self, dim: usize, theta: f64) -> Vec<f32> {
        let pair_of =
            |turns: f64| dim as f64 * (self.original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let scaled = |(pair, power): (usize, f32)| {
            let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            (1.0 / (self.factor as f32 * power)) * (1.0 - kept) + (1.0 / power) * kept
        };
        powers(dim, theta).enumerate().map(scaled).collect()
    }
}

impl spec::Rotary {
    /// Frequencies `theta^(-2i/dim)`, scaled. Rounded to float32 where transformers rounds.
    pub(super) fn new(dim: usize, theta: f64, scaling: &Scaling) -> Self {
        let base = plain(dim, theta);
        let (mut attention_factor, mut long) = (1.0, LongContext::Same);
        let divided = |factors: &[f32]| powers(dim, theta).zip(factors).map(|(power, f)| 1.0 / (f * power)).collect();
        let inv_freq = match scaling {
            Scaling::Default => base.collect(),
            Scaling::Linear { factor } => base.map(|f| f / *factor as f32).collect(),
            Scaling::Factors(factors) => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                base.map(|f| llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_positions)).collect()
            }
            Scaling::Dynamic { factor, original } => {
                long = LongContext::Ntk { original: *original, theta, factor: *factor };
                base.collect()
            }
            Scaling::Yarn(yarn) => {
                attention_factor = yarn.attention_factor();
                yarn.inv_freq(dim, theta)
            }
            Scaling::Longrope { short, long: beyond, factor, original, attention_factor: given } => {
                let suggested = || (1.0 + factor.ln() / (*original as f64).ln()).sqrt();
                attention_factor = given.unwrap_or_else(|| if *factor <= 1.0 { 1.0 } else { suggested() });
                long = LongContext::Switched { original: *original, inv_freq: divided(beyond) };
                divided(short)
            }
        };
        Self { dim, interleaved: false, inv_freq, attention_factor, long }
    }
}

/// `theta^(2i/dim)` in float32.
fn powers(dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / dim as f32))
}

/// `theta^(-2i/dim)` in float32.
fn plain(dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    powers(dim, theta).map(|power| 1.0 / power)
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

    fn assert_near(found: &[f32], indices: &[usize], expected: &[f32]) {
        for (index, expected) in indices.iter().zip(expected) {
            assert!((found[*index] / expected - 1.0).abs() < 1e-6, "{index}: {} and {expected}", found[*index]);
        }
    }

    /// Frequencies and factors of transformers' `ROPE_INIT_FUNCTIONS["yarn"]` for heads of 128 and theta 10⁶.
    #[test]
    fn yarn_keeps_high_and_divides_low_frequencies() {
        let qwen = Yarn {
            factor: 4.0,
            original: 32768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
            mscale: 0.0,
            mscale_all_dim: 0.0,
        };
        let indices = [0, 17, 23, 30, 36, 40, 46, 63];
        let rotary = Rotary::new(128, 1e6, &Scaling::Yarn(qwen.clone()));
        let expected = [
            1.0,
            0.025_482_967,
            0.006_978_306,
            0.001_064_361,
            0.000_179_841_15,
            4.445_698_5e-5,
            1.217_418_9e-5,
            3.102_344_4e-7,
        ];
        assert_near(&rotary.inv_freq, &indices, &expected);
        assert!((rotary.attention_factor - 1.138_629_436_111_989).abs() < 1e-12);
        let untruncated = Yarn {
            factor: 40.0,
            original: 4096.0,
            beta_fast: 48.0,
            beta_slow: 2.0,
            truncate: false,
            mscale: 0.707,
            mscale_all_dim: 1.0,
            ..qwen
        };
        let rotary = Rotary::new(128, 1e6, &Scaling::Yarn(untruncated));
        let expected = [
            1.0,
            0.017_187_666,
            0.001_933_821_4,
            3.849_816e-5,
            1.054_241_2e-5,
            4.445_698_3e-6,
            1.217_418_8e-6,
            3.102_344_3e-8,
        ];
        assert_near(&rotary.inv_freq, &indices, &expected);
        assert!((rotary.attention_factor - 0.921_042_355_316_339_9).abs() < 1e-12);
    }

    /// The same of `longrope` and `dynamic` for theta 10⁴.
    #[test]
    fn long_contexts_have_frequencies_of_their_own() {
        let longrope = Scaling::Longrope {
            short: (0..64u8).map(|i| 1.0 + f32::from(i) / 64.0).collect(),
            long: (0..64u8).map(|i| 1.0 + f32::from(i)).collect(),
            factor: 32.0,
            original: 4096,
            attention_factor: None,
        };
        let rotary = Rotary::new(128, 1e4, &longrope);
        assert!((rotary.attention_factor - 1.190_238_071_423_808_3).abs() < 1e-12);
        assert_near(&rotary.frequencies(4096), &[0, 20, 63], &[1.0, 0.042_845_05, 5.819_373_5e-5]);
        assert_near(&rotary.frequencies(4097), &[0, 20, 63], &[1.0, 0.002_677_815_7, 1.804_346_8e-6]);
        let rotary = Rotary::new(128, 1e4, &Scaling::Dynamic { factor: 2.0, original: 4096 });
        assert_eq!(*rotary.frequencies(4096), *Rotary::new(128, 1e4, &Scaling::Default).inv_freq);
        assert_near(&rotary.frequencies(10_000), &[0, 20, 63], &[1.0, 0.036_556_903, 2.974_086_6e-5]);
    }
}
