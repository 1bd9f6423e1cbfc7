//! Guest side of picovm: root file system images (EROFS) and the initramfs.
//!
//! * [`image`] makes an image, a read-only EROFS file, from a directory, a tar archive, or the layers of an OCI image;
//! * [`unpack`] unpacks archives from untrusted sources;
//! * [`initramfs`] packs init (the crate `picovm-init`) into the archive that the kernel unpacks at boot.

mod archive;
pub mod image;
pub mod initramfs;
mod tree;
pub mod unpack;
