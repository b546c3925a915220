//! Where a model is computed.

#[cfg(feature = "cuda")]
mod cuda;

use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
pub use cuda::stream as cuda_stream;

use super::{Error, Result};

/// Which device is asked for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceChoice {
    /// The first GPU that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by its number; without one, the first, or the process's own where several share a machine.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(None)),
            Some(("cuda", number)) if number.parse::<u16>().is_ok() => Ok(Self::Cuda(number.parse().ok())),
            _ => Err(format!("`{text}` is none of auto, cpu, cuda, cuda:0, cuda:1, …")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// How matrix products of float32 are computed on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// In float32.
    #[default]
    Exact,
    /// With factors rounded to TF32, 10 bits of mantissa.
    Tf32,
}

impl DeviceChoice {
    /// Opens the device. `auto` takes the CPU where there is no GPU to use, and says so where this program could use one.
    /// `local_rank` is the process's number on its machine.
    ///
    /// # Errors
    /// When a GPU is asked for and cannot be used; says why and what to do.
    pub fn open(self, local_rank: usize) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(number) => gpu(number.unwrap_or(local_rank)),
            Self::Auto if !cfg!(feature = "cuda") => Ok(Device::Cpu),
            Self::Auto => gpu(local_rank).or_else(|error| {
                tracing::warn!("computing on the CPU: {error}");
                Ok(Device::Cpu)
            }),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device> {
    cuda::open(number)
}

#[cfg(not(feature = "cuda"))]
fn gpu(number: usize) -> Result<Device> {
    Err(Error::Device {
        device: format!("cuda:{number}"),
        why: "this prefold was built without CUDA".into(),
        help: "build it with `--features cuda` (see README, \"CUDA\"), or use --device cpu".into(),
    })
}

/// Chooses how float32 matrix products are computed on GPUs, for the whole process.
pub fn set_matmul_precision(precision: MatmulPrecision) {
    #[cfg(feature = "cuda")]
    candle_core::cuda::set_gemm_reduced_precision_f32(precision == MatmulPrecision::Tf32);
    #[cfg(not(feature = "cuda"))]
    let _ = precision;
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// In all.
    pub total: u64,
    /// Not used by any process.
    pub free: u64,
    /// The most that tensors of this process took at a time.
    pub peak: u64,
}

/// The memory of a GPU; none of the CPU, or where the driver does not tell.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "cuda")]
    return cuda::memory(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Begins to measure [`DeviceMemory::peak`] anew.
pub fn reset_peak_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    cuda::reset_peak(device);
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// A device's name and what it is: `cpu`, `cuda:0 (NVIDIA H200, compute capability 9.0)`.
pub fn describe(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    if let Some(name) = cuda::describe(device) {
        return name;
    }
    if device.is_cpu() { "cpu".into() } else { format!("{:?}", device.location()) }
}

/// Whether an operation failed because the device's memory is full.
pub fn is_out_of_memory(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("CUBLAS_STATUS_ALLOC_FAILED") {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_elsewhere() {
        for text in ["auto", "cpu", "cuda", "cuda:0", "cuda:12"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", ""] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().contains("cuda:0"), "{text}");
        }
    }

    /// A machine of tests may have a GPU; what it has is not asked for.
    #[test]
    fn a_gpu_that_is_not_there_is_an_error_and_auto_takes_the_cpu_without_any() {
        let error = DeviceChoice::Cuda(Some(999)).open(0).unwrap_err();
        assert!(matches!(&error, Error::Device { device, .. } if device == "cuda:999"), "{error}");
        assert!(DeviceChoice::Cpu.open(7).unwrap().is_cpu());
        assert!(!DeviceChoice::Auto.open(999).unwrap().is_cuda());
    }

    #[test]
    fn memory_that_ran_out_is_known_through_the_chain() {
        let error = candle_core::Error::Cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        let error = Error::candle("running a layer")(error);
        assert!(is_out_of_memory(&error));
        assert!(!is_out_of_memory(&Error::candle("running a layer")(candle_core::Error::msg("no"))));
    }
}
