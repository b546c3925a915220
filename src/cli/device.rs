//! `--device` and `--tf32`, and what to do when a device's memory is full.

use candle_core::Device;
use clap::Args;
use miette::Result;

use crate::base::{DeviceChoice, MatmulPrecision, is_out_of_memory, set_matmul_precision};

/// Where candle computes.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct DeviceArgs {
    /// Where candle computes: auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Round the factors of float32 matrix products to TF32 on a GPU: faster, three decimal digits
    #[arg(long)]
    tf32: bool,
}

impl DeviceArgs {
    pub(super) fn open(self) -> Result<Device> {
        open(self.device, self.tf32, 0)
    }
}

/// Opens a device and chooses how its float32 products are computed.
pub(super) fn open(device: DeviceChoice, tf32: bool, local_rank: usize) -> Result<Device> {
    set_matmul_precision(if tf32 { MatmulPrecision::Tf32 } else { MatmulPrecision::Exact });
    Ok(device.open(local_rank)?)
}

/// The same failure with `help`, where it is that the device's memory was full.
pub(super) fn with_memory_help(report: miette::Report, help: impl FnOnce() -> String) -> miette::Report {
    let source: &(dyn std::error::Error + 'static) = report.as_ref();
    if !is_out_of_memory(source) {
        return report;
    }
    miette::miette!(code = "prefold::device::memory", help = help(), "the memory of the GPU is full: {report}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_memory_comes_with_help_and_another_failure_as_it_is() {
        let failed = |text: &str| {
            let source = candle_core::Error::Cuda(text.into());
            miette::Report::new(crate::base::Error::Candle { action: "running a layer", source })
        };
        let full = with_memory_help(failed("DriverError(CUDA_ERROR_OUT_OF_MEMORY)"), || "a smaller batch".into());
        assert!(full.to_string().starts_with("the memory of the GPU is full"), "{full}");
        assert_eq!(full.help().unwrap().to_string(), "a smaller batch");
        let other = with_memory_help(failed("an illegal address"), String::new);
        assert!(other.to_string().contains("an illegal address"), "{other}");
    }
}
