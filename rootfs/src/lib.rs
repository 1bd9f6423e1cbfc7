//! Guest side of picovm: root file system images (EROFS) and the initramfs.
//!
//! * [`image`] makes an image, a read-only EROFS file, from a directory or a tar archive;
//! * [`initramfs`] packs init (the crate `picovm-init`) into the archive that the kernel unpacks at boot.

pub mod image;
pub mod initramfs;
#[cfg(fuzzing)]
pub mod unpack;
#[cfg(not(fuzzing))]
mod unpack;
