//! The command line of what has to do with images. `picovm image X` and `picovm X` are the same, as in Docker.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use picovm_engine::Platform;

use crate::pull_arguments::{LimitOptions, PullArguments};

#[derive(Subcommand)]
pub enum ImageCommand {
    /// Make an image of a root file system: a directory or a tar archive (plain, gzip, zstd or xz)
    #[command(after_help = "Examples:
  picovm image build base rootfs.tar.zst
  picovm image build localhost/team/app:1 ./rootfs

An image of several layers comes by `picovm pull` or `picovm load`.")]
    Build {
        /// Name to give it
        name: String,
        /// Directory or archive
        source: PathBuf,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls(ListOptions),
    /// Remove images, and the templates made of them
    #[command(visible_alias = "remove")]
    Rm(RemoveOptions),
    /// Fetch an image from a registry
    Pull(PullArguments),
    /// Load images of an archive or an OCI image layout
    Load(LoadArguments),
    /// Write images as an archive
    Save(SaveOptions),
    /// Give an image another name
    Tag(TagOptions),
    /// Show images as JSON
    Inspect(InspectOptions),
    /// Remove images without a name, and content that no image needs
    Prune(PruneOptions),
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm images
  picovm images debian
  picovm images --format '{{.Repository}}:{{.Tag}} {{.Size}}'
  picovm rmi $(picovm images -q --filter dangling=true)

Fields of --format: .Repository .Tag .ID .Digest .CreatedSince .CreatedAt .Size .Bytes")]
pub struct ListOptions {
    /// Only images of this repository, or of this name
    pub name: Option<String>,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Accepted for compatibility: there are no images between layers
    #[arg(short, long)]
    pub all: bool,
    /// Show the registries' digests
    #[arg(long)]
    pub digests: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub no_trunc: bool,
    /// Only images with dangling=true|false, reference=PATTERN or label=KEY[=VALUE]
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// `table`, `json`, or a template of Go
    #[arg(long, value_name = "FORMAT", conflicts_with_all = ["quiet", "json"])]
    pub format: Option<String>,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm rmi debian:12
  picovm rmi --force 4f3bca1d2e5c

A name is removed, and with its last name the image, unless a container is made of it.")]
pub struct RemoveOptions {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// Remove all names of an image that is given by its id, do not mind images that are not there, and take away names of images
    /// that containers are made of
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  docker save debian | picovm load
  picovm load -i app.tar.gz
  skopeo copy docker://debian oci:layout:debian:latest && picovm load -i layout")]
pub struct LoadArguments {
    /// Archive of `docker save`, or archive or directory of an OCI image layout; by default, standard input
    #[arg(short, long, value_name = "FILE|DIR")]
    pub input: Option<PathBuf>,
    /// Of an image for several platforms, which one
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", default_value_t)]
    pub platform: Platform,
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub limits: LimitOptions,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm save debian | docker load
  picovm save -o images.tar debian:12 app:1

The archive is an OCI image layout, and what `docker load` reads.")]
pub struct SaveOptions {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// Write to this file; by default, to standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Example:
  picovm tag debian localhost:5000/debian:mine")]
pub struct TagOptions {
    /// Name or id
    pub image: String,
    /// The other name
    pub name: String,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm inspect debian
  picovm inspect --format '{{json .Config.Cmd}}' debian")]
pub struct InspectOptions {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// `json`, or a template of Go
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm prune
  picovm prune --all --force")]
pub struct PruneOptions {
    /// Remove all images that no container is made of
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
}
