//! Kernels on a CUDA device: compiled for it once, at their first call, and called without waiting for them.
#![allow(unsafe_code)] // kernel launches: see `run`

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{CudaStorage, DType, Error, Layout, Result, Storage};

use super::launch::{Argument, Call, Source};

/// The compute capability that has all instructions of the kernels: 8.0.
const OLDEST: i32 = 80;

/// Shared memory that a kernel has without being allowed more.
const SHARED: usize = 48 << 10;

/// Compiled kernels by device, file and type.
type Compiled = HashMap<(DeviceId, Source, DType), Arc<str>>;

static COMPILED: Mutex<Option<Compiled>> = Mutex::new(None);

fn failed(doing: &str) -> impl Fn(&dyn Display) -> Error {
    move |why| Error::msg(format!("{doing}: {why}"))
}

/// Whether the device can have kernels: it is new enough, and the compiler is there. Where it is not, says so once.
pub(super) fn has_kernels(device: &CudaDevice) -> bool {
    static KNOWN: Mutex<Vec<(DeviceId, bool)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, has)) = known.iter().find(|(id, _)| *id == device.id()) {
        return *has;
    }
    let tried = capability(device).and_then(|capability| {
        if capability < OLDEST {
            candle_core::bail!("it has compute capability {capability}, the kernels begin with {OLDEST}");
        }
        compiled(Source::Norm, DType::F32, device)
    });
    if let Err(why) = &tried {
        tracing::warn!(
            "the GPU computes with candle's operations, slower and with more memory than with kernels: {why}"
        );
    }
    known.push((device.id(), tried.is_ok()));
    tried.is_ok()
}

/// The device's compute capability, as 90 for 9.0.
fn capability(device: &CudaDevice) -> Result<i32> {
    let (major, minor) = device
        .cuda_stream()
        .context()
        .compute_capability()
        .map_err(|why| failed("asking for the compute capability")(&why))?;
    Ok(major * 10 + minor)
}

/// Bytes of shared memory that a block can have.
pub(super) fn shared_limit(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let limit = device
        .cuda_stream()
        .context()
        .attribute(attribute)
        .map_err(|why| failed("asking for the shared memory")(&why))?;
    Ok(limit.max(0) as usize)
}

/// A file as PTX for the device.
fn compiled(source: Source, real: DType, device: &CudaDevice) -> Result<Arc<str>> {
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    let compiled = compiled.get_or_insert_default();
    let key = (device.id(), source, real);
    if let Some(ptx) = compiled.get(&key) {
        return Ok(ptx.clone());
    }
    let architecture = format!("--gpu-architecture=compute_{}", capability(device)?);
    let options = vec![architecture, "--std=c++17".into()];
    let options = CompileOptions { options, ..CompileOptions::default() };
    let ptx = compile_ptx_with_opts(source.text(real)?, options)
        .map_err(|why| Error::msg(format!("compiling the kernels {source:?} of {real:?} (NVRTC): {why}")))?;
    let ptx: Arc<str> = ptx.to_src().into();
    compiled.insert(key, ptx.clone());
    Ok(ptx)
}

/// Runs a call; see [`Call::run`].
pub(super) fn run(call: &Call, outputs: &[(DType, usize)], device: &CudaDevice) -> Result<Vec<Storage>> {
    let new = |(dtype, count): &(DType, usize)| {
        // SAFETY: the kernel writes every number before anything reads one; that it does is tested in the emulator, where outputs
        // begin as no numbers
        let slice = unsafe {
            match dtype {
                DType::F32 => Slice::F32(device.alloc(*count)?),
                DType::F64 => Slice::F64(device.alloc(*count)?),
                DType::BF16 => Slice::BF16(device.alloc(*count)?),
                DType::F16 => Slice::F16(device.alloc(*count)?),
                other => candle_core::bail!("{}: no output can be {other:?}", call.entry),
            }
        };
        Ok(CudaStorage { slice, device: device.clone() })
    };
    let mut storages = outputs.iter().map(new).collect::<Result<Vec<_>>>()?;
    if !call.is_empty() {
        launch(call, &mut storages.iter_mut().collect::<Vec<_>>(), device)?;
    }
    Ok(storages.into_iter().map(Storage::Cuda).collect())
}

/// One argument as the launch takes it.
enum Word {
    Pointer(sys::CUdeviceptr),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

/// Where a tensor's numbers begin.
fn pointer<'a>(storage: &'a Storage, layout: &Layout, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    let Storage::Cuda(storage) = storage else { candle_core::bail!("a kernel's input is on another device") };
    let (start, guard) = match &storage.slice {
        Slice::U8(x) => x.device_ptr(stream),
        Slice::U32(x) => x.device_ptr(stream),
        Slice::F32(x) => x.device_ptr(stream),
        Slice::F64(x) => x.device_ptr(stream),
        Slice::BF16(x) => x.device_ptr(stream),
        Slice::F16(x) => x.device_ptr(stream),
        _ => candle_core::bail!("a kernel's input is of a type that no kernel takes"),
    };
    Ok((start + (layout.start_offset() * layout_size(&storage.slice)) as u64, guard))
}

/// Bytes of a number.
fn layout_size(slice: &Slice) -> usize {
    match slice {
        Slice::U8(_) => 1,
        Slice::BF16(_) | Slice::F16(_) => 2,
        Slice::F64(_) => 8,
        _ => 4,
    }
}

fn pointer_mut<'a>(storage: &'a mut CudaStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    Ok(match &mut storage.slice {
        Slice::F32(x) => x.device_ptr_mut(stream),
        Slice::F64(x) => x.device_ptr_mut(stream),
        Slice::BF16(x) => x.device_ptr_mut(stream),
        Slice::F16(x) => x.device_ptr_mut(stream),
        _ => candle_core::bail!("a kernel's output is of a type that no kernel gives"),
    })
}

/// Calls a kernel with outputs that exist.
pub(super) fn launch(call: &Call, outputs: &mut [&mut CudaStorage], device: &CudaDevice) -> Result<()> {
    let ptx = compiled(call.source, call.real, device)?;
    let module = format!("prefold-{:?}-{:?}", call.source, call.real);
    let function = device.get_or_load_custom_func(call.entry, &module, &ptx)?;
    if call.shared > SHARED {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, call.shared as i32).map_err(|why| call.error(why))?;
    }
    let stream = device.cuda_stream();
    let inputs = call.arguments.iter().filter_map(|argument| match argument {
        Argument::Input(tensor) => Some(tensor.storage_and_layout()),
        _ => None,
    });
    let inputs: Vec<_> = inputs.collect();
    let mut guards = Vec::new();
    let mut given = Vec::with_capacity(inputs.len());
    for (storage, layout) in &inputs {
        let (at, guard) = pointer(storage, layout, &stream)?;
        given.push(at);
        guards.push(guard);
    }
    let mut made = Vec::with_capacity(outputs.len());
    for output in outputs {
        let (at, guard) = pointer_mut(output, &stream)?;
        made.push(at);
        guards.push(guard);
    }
    let mut given = given.into_iter();
    let words = call.arguments.iter().map(|argument| match argument {
        Argument::Input(_) => given.next().map(Word::Pointer),
        Argument::None => Some(Word::Pointer(0)),
        Argument::Output(at) => made.get(*at).map(|at| Word::Pointer(*at)),
        Argument::I32(x) => Some(Word::I32(*x)),
        Argument::I64(x) => Some(Word::I64(*x)),
        Argument::F32(x) => Some(Word::F32(*x)),
        Argument::F64(x) => Some(Word::F64(*x)),
    });
    let Some(words) = words.collect::<Option<Vec<Word>>>() else {
        return Err(call.error("it names an output that it is not given"));
    };
    let mut builder = function.builder();
    for word in &words {
        match word {
            Word::Pointer(x) => builder.arg(x),
            Word::I32(x) => builder.arg(x),
            Word::I64(x) => builder.arg(x),
            Word::F32(x) => builder.arg(x),
            Word::F64(x) => builder.arg(x),
        };
    }
    let size = |x: usize| u32::try_from(x).map_err(|_| call.error("a size is beyond 32 bits"));
    let [x, y, z] = call.grid;
    let config = LaunchConfig {
        grid_dim: (size(x)?, size(y)?, size(z)?),
        block_dim: (size(call.block[0])?, size(call.block[1])?, 1),
        shared_mem_bytes: size(call.shared)?,
    };
    // SAFETY: kind and order of the arguments are those of the kernel, whose reads and writes stay within the tensors; the emulator
    // checks both for the same calls. Inputs live until the stream has passed the kernel, which `guards` see to.
    unsafe { builder.launch(config) }.map_err(|why| call.error(why))?;
    drop(guards);
    Ok(())
}
