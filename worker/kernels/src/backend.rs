//! Which devices there are, and how one is chosen at run time.

use std::str::FromStr;

/// Burn's CPU backend.
pub type Cpu = burn_flex::Flex;
/// Burn's CUDA backend, in f32.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cuda::Cuda<f32, i32>;

/// What the user asked for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A CUDA device where one is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index; the worker's local rank where absent.
    Cuda(Option<usize>),
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The name is none that we know.
    #[error("unknown device '{0}': use auto, cpu, cuda or cuda:N")]
    Unknown(String),
    /// This program was built without CUDA.
    #[error("this build has no CUDA support: build with `--features cuda`, or use --device cpu")]
    NotBuilt,
    /// No driver, or no such device.
    #[error("CUDA device {index} cannot be used: {reason}; check `nvidia-smi`, or use --device cpu")]
    Unavailable {
        /// Index asked for.
        index: usize,
        /// What the probe found.
        reason: String,
    },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                index.parse().map(|index| Self::Cuda(Some(index))).map_err(|_| unknown())
            }
        }
    }
}

/// A device that was found to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The CPU, through Burn's Flex backend.
    Cpu,
    /// A CUDA device by index.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl Device {
    /// Finds the device that was asked for; `local_rank` picks among several where none was named.
    pub fn find(choice: DeviceChoice, local_rank: usize) -> Result<Self, DeviceError> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::Cpu),
            DeviceChoice::Auto => Ok(cuda::any(local_rank).unwrap_or(Self::Cpu)),
            DeviceChoice::Cuda(index) => cuda::find(index, local_rank),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// The CUDA device of this index, as Burn names it.
#[cfg(feature = "cuda")]
pub fn cuda_device(index: usize) -> burn_cuda::CudaDevice {
    burn_cuda::CudaDevice::new(index)
}

/// The processor's vector features, which choose kernels at run time: equal ones give equal bits.
pub fn cpu_features() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let features = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ];
        let found: Vec<&str> = features.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect();
        format!("x86-64 {}", found.join("+"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH.to_owned()
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    //! A build without CUDA: says so.
    use super::{Device, DeviceError};

    pub(super) fn any(_local_rank: usize) -> Option<Device> {
        None
    }

    pub(super) fn find(_index: Option<usize>, _local_rank: usize) -> Result<Device, DeviceError> {
        Err(DeviceError::NotBuilt)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Counts devices before Burn touches one: without a driver cudarc panics.
    use super::{Device, DeviceError};

    fn count() -> Result<usize, String> {
        let probe = std::panic::catch_unwind(cudarc::driver::CudaContext::device_count);
        match probe {
            Ok(Ok(count)) => Ok(usize::try_from(count).unwrap_or(0)),
            Ok(Err(error)) => Err(format!("{error:?}")),
            Err(_) => Err("no CUDA driver was found (libcuda.so)".to_owned()),
        }
    }

    pub(super) fn any(local_rank: usize) -> Option<Device> {
        let count = count().ok().filter(|&count| count > 0)?;
        Some(Device::Cuda(local_rank % count))
    }

    pub(super) fn find(index: Option<usize>, local_rank: usize) -> Result<Device, DeviceError> {
        let unavailable = |reason| DeviceError::Unavailable { index: index.unwrap_or(local_rank), reason };
        let count = count().map_err(unavailable)?;
        match index {
            Some(index) if index >= count => Err(unavailable(format!("there are {count} devices"))),
            None if count == 0 => Err(unavailable("there are no devices".to_owned())),
            Some(index) => Ok(Device::Cuda(index)),
            None => Ok(Device::Cuda(local_rank % count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_help_says() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(Some(3))));
        assert_eq!("cuda:x".parse::<DeviceChoice>(), Err(DeviceError::Unknown("cuda:x".to_owned())));
    }
}
