//! NVIDIA GPUs through the CUDA driver.
#![allow(unsafe_code)] // calls of the driver that cudarc has no safe form of: see each

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use candle_core::{DType, Device, Tensor};

use super::{DeviceMemory, Error, Result};

/// The compute capability that candle's kernels were compiled for, ten times.
const BUILT_FOR: Option<&str> = option_env!("CUDA_COMPUTE_CAP");

/// Opens a GPU, and computes something on it: a driver that is too old fails only then.
pub(super) fn open(number: usize) -> Result<Device> {
    let device = format!("cuda:{number}");
    let fail = |why: String, help: String| Error::Device { device: device.clone(), why, help };
    let missing = load_libraries();
    let count = CudaContext::device_count().map_err(|error| {
        let (why, help) = why_no_driver(error);
        fail(why, help)
    })?;
    if i32::try_from(number).is_ok_and(|number| number >= count) || count == 0 {
        let why = match count {
            0 => "the machine has no NVIDIA GPU that this process may see".to_owned(),
            1 => "the machine has one GPU, cuda:0".to_owned(),
            _ => format!("the machine has {count} GPUs, cuda:0 to cuda:{}", count - 1),
        };
        return Err(fail(why, "look at `nvidia-smi -L` and CUDA_VISIBLE_DEVICES, or use --device cpu".into()));
    }
    if !missing.is_empty() {
        let help = "they are looked for on LD_LIBRARY_PATH, in a toolkit (CUDA_HOME) and in Python's nvidia packages: install \
                    one of these, or use --device cpu";
        return Err(fail(format!("{} cannot be loaded", missing.join(", ")), help.into()));
    }
    check_capability(number).map_err(|(why, help)| fail(why, help))?;
    let opened = Device::new_cuda(number)
        .map_err(|error| fail(format!("the GPU cannot be used: {error}"), format!("see `nvidia-smi`, {USE_CPU}")))?;
    keep_memory(&opened);
    let probe = || Tensor::ones(2, DType::F32, &opened)?.affine(2.0, 1.0)?.to_vec1::<f32>();
    match probe() {
        Ok(values) if values == [3.0, 3.0] => Ok(opened),
        Ok(values) => Err(fail(format!("2 · 1 + 1 is {values:?} on it"), "the GPU or its driver is damaged".into())),
        Err(error) => {
            let (why, help) = why_no_kernel(&error.to_string());
            Err(fail(why, help))
        }
    }
}

/// `13.0` of the driver, as the CUDA version that it serves.
fn driver_version() -> Option<(i32, i32)> {
    let mut version = 0;
    // SAFETY: writes one number to a place that is valid for it; needs no initialised driver.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    (code == sys::CUresult::CUDA_SUCCESS && version > 0).then_some((version / 1000, version % 1000 / 10))
}

/// The CUDA version that this program was built with.
fn built_with() -> (u32, u32) {
    (sys::CUDA_VERSION / 1000, sys::CUDA_VERSION % 1000 / 10)
}

const USE_CPU: &str = "or use --device cpu";

fn why_no_driver(DriverError(code): DriverError) -> (String, String) {
    let (major, minor) = built_with();
    match (code, driver_version()) {
        (sys::CUresult::CUDA_ERROR_NO_DEVICE, None) => (
            "there is no NVIDIA driver: libcuda.so.1 cannot be loaded".into(),
            format!(
                "install the driver of CUDA {major}.{minor} or later (in a container: start it with --gpus all), {USE_CPU}"
            ),
        ),
        (sys::CUresult::CUDA_ERROR_NO_DEVICE, _) => (
            "the machine has no NVIDIA GPU that this process may see".into(),
            format!("look at `nvidia-smi -L` and CUDA_VISIBLE_DEVICES, {USE_CPU}"),
        ),
        (code, version) => {
            let version = version.map_or("unknown".into(), |(major, minor)| format!("{major}.{minor}"));
            (
                format!(
                    "the driver does not start: {code:?} (it serves CUDA {version}, this prefold was built with {major}.{minor})"
                ),
                format!(
                    "see whether `nvidia-smi` works; after an update of the driver the machine must be restarted; {USE_CPU}"
                ),
            )
        }
    }
}

/// Whether the kernels that were compiled run on a GPU.
fn check_capability(number: usize) -> std::result::Result<(), (String, String)> {
    let Some(built) = BUILT_FOR.and_then(|built| built.split([';', ',']).next()?.parse::<i32>().ok()) else {
        return Ok(());
    };
    let found = CudaContext::new(number).and_then(|context| Ok((context.compute_capability()?, context.name()?)));
    let ((major, minor), name) = match found {
        Ok(found) => found,
        Err(DriverError(code)) => {
            let help = format!("is another process using the GPU alone? See `nvidia-smi`, {USE_CPU}");
            return Err((format!("the GPU cannot be used: {code:?}"), help));
        }
    };
    if major * 10 + minor >= built {
        return Ok(());
    }
    Err((
        format!(
            "{name} has compute capability {major}.{minor}, and this prefold was built for {}.{} and later",
            built / 10,
            built % 10
        ),
        format!("build it with CUDA_COMPUTE_CAP={major}{minor}, {USE_CPU}"),
    ))
}

/// Loads CUDA's libraries from where they lie; gives back the names of those that are needed and not there. Without the
/// compiler candle's own operations serve.
fn load_libraries() -> Vec<String> {
    let (major, minor) = built_with();
    // the compiler opens its builtins by name when it begins
    let builtins = format!("libnvrtc-builtins.so.{major}.{minor}");
    let names = ["cublasLt", "cublas", "nvrtc"].map(|name| format!("lib{name}.so.{major}"));
    let names = names.iter().chain([&builtins]).map(String::as_str).chain(["libcurand.so.10"]);
    let mut missing = crate::files::load_libraries(&names.collect::<Vec<_>>());
    missing.retain(|name| !name.starts_with("libnvrtc"));
    missing
}

fn why_no_kernel(error: &str) -> (String, String) {
    let (major, minor) = built_with();
    let version = driver_version().map_or("unknown".into(), |(major, minor)| format!("{major}.{minor}"));
    if error.contains("UNSUPPORTED_PTX_VERSION") {
        let why = format!("its driver serves CUDA {version}, and this prefold was built with CUDA {major}.{minor}");
        return (why, format!("update the driver, or build with CUDA {version}, {USE_CPU}"));
    }
    if ["NO_BINARY_FOR_GPU", "INVALID_PTX", "INVALID_IMAGE"].iter().any(|name| error.contains(name)) {
        let why =
            format!("the kernels of this prefold (CUDA_COMPUTE_CAP={}) do not load", BUILT_FOR.unwrap_or("native"));
        return (why, format!("build it on this machine, or with its CUDA_COMPUTE_CAP, {USE_CPU}"));
    }
    (format!("it does not compute: {error}"), format!("see `nvidia-smi`, {USE_CPU}"))
}

fn context(device: &Device) -> Option<Arc<CudaContext>> {
    Some(stream(device)?.context().clone())
}

/// The stream that a GPU's operations run on; none of another device.
pub fn stream(device: &Device) -> Option<Arc<CudaStream>> {
    Some(device.as_cuda_device().ok()?.cuda_stream())
}

/// The pool that tensors are made from.
fn pool(device: &Device) -> Option<sys::CUmemoryPool> {
    let context = context(device).filter(|context| context.has_async_alloc())?;
    // SAFETY: the device belongs to a context that lives.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.ok()
}

fn attribute(pool: sys::CUmemoryPool, which: sys::CUmemPool_attribute) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: the attributes that are asked for here are 64 bits wide.
    unsafe { result::mem_pool::get_attribute(pool, which, (&raw mut value).cast()) }.ok()?;
    Some(value)
}

fn set_attribute(pool: sys::CUmemoryPool, which: sys::CUmemPool_attribute, mut value: u64) {
    // SAFETY: the attributes that are set here are 64 bits wide.
    if let Err(error) = unsafe { result::mem_pool::set_attribute(pool, which, (&raw mut value).cast()) } {
        tracing::debug!("{which:?} of the memory pool cannot be set: {error:?}");
    }
}

/// Keeps freed memory for the next step, which would otherwise be given back whenever the device is waited for.
fn keep_memory(device: &Device) {
    if let Some(pool) = pool(device) {
        set_attribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX);
    }
}

pub(super) fn memory(device: &Device) -> Option<DeviceMemory> {
    let (free, total) = context(device)?.mem_get_info().ok()?;
    let peak = attribute(pool(device)?, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
    Some(DeviceMemory { total: total as u64, free: free as u64, peak })
}

pub(super) fn reset_peak(device: &Device) {
    if let Some(pool) = pool(device) {
        set_attribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
    }
}

pub(super) fn describe(device: &Device) -> Option<String> {
    let context = context(device)?;
    let ((major, minor), name) = (context.compute_capability().ok()?, context.name().ok()?);
    Some(format!("cuda:{} ({name}, compute capability {major}.{minor})", context.ordinal()))
}
