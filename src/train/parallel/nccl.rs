//! Sums of gradients that lie on GPUs, through NCCL: they never pass through the processes' own memory.

use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Tensor};

use super::{Error, Group, Result};
use crate::base::cuda_stream;

/// The GPUs of a group.
pub(super) struct Ring(Comm);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("rank", &self.0.rank()).field("world_size", &self.0.world_size()).finish()
    }
}

impl Ring {
    /// Joins the GPUs of all processes; process 0 names the ring.
    pub(super) fn join(group: &Group, device: &Device) -> Result<Self> {
        let failed = |why: String| Error::Nccl { why };
        let Some(stream) = cuda_stream(device) else { return Err(failed("the device is no GPU".into())) };
        let name = (group.rank() == 0).then(Id::new).transpose();
        // process 0 tells the others of its failure too, by a name of no bytes
        let mut bytes: Vec<u8> = match &name {
            Ok(Some(id)) => id.internal().iter().map(|byte| byte.cast_unsigned()).collect(),
            _ => Vec::new(),
        };
        group.broadcast(&mut bytes)?;
        name.map_err(|error| failed(format!("{error:?}: is libnccl.so.2 on LD_LIBRARY_PATH?")))?;
        let mut internal = [0; 128];
        if bytes.len() != internal.len() {
            return Err(failed("process 0 could not name the ring".into()));
        }
        internal.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte.cast_signed());
        let ring = Comm::from_rank(stream, group.rank(), group.world_size(), Id::uninit(internal));
        ring.map(Self).map_err(|error| {
            failed(format!(
                "{error:?}: each process needs a GPU of its own (see LOCAL_RANK), and NCCL_DEBUG=INFO tells more"
            ))
        })
    }

    /// Puts in place of each float32 number its sum over the processes.
    pub(super) fn sum(&self, values: &Tensor) -> candle_core::Result<()> {
        values.inplace_op1(&Sum(&self.0))
    }
}

struct Sum<'a>(&'a Comm);

impl InplaceOp1 for Sum<'_> {
    fn name(&self) -> &'static str {
        "nccl-sum"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("nccl-sum: the numbers are on the CPU")
    }

    fn cuda_fwd(&self, values: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let count = layout.shape().elem_count();
        let slice = values.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, count)) || slice.len() != count {
            candle_core::bail!("nccl-sum: the numbers are a part of a tensor");
        }
        self.0
            .all_reduce_in_place(slice, &ReduceOp::Sum)
            .map_err(|error| candle_core::Error::msg(format!("{error:?}")))?;
        Ok(())
    }
}
