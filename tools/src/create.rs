//! `kagami create`: make this node's disk a replica of a mirror.

use crate::context::Context;
use crate::human;
use crate::options::Place;
use crate::output;
use crate::store::{Access, Store, metadata_place};
use clap::Args;
use mirror_core::config::{Config, Metadata, Mirror, Side, parse_size};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::meta::superblock::{SlotError, Superblock};
use mirror_core::meta::{self, Layout, LayoutError, META_BLOCK, NewReplica, SLOTS};
use mirror_core::types::ReplicaId;
use std::path::Path;

/// Make this node's disk a replica of a mirror.
///
/// Writes fresh metadata for this node's disk. The data on the disk stays as it is, but for the
/// tail that internal metadata takes; both copies count as unknown until
/// `kagami primary --initial` on one node says whose data is to be kept.
///
/// Needs no daemon, and refuses while one holds the disk.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami create r0                 on both nodes, once
  kagami create r0 --size 1GiB     also make the disk, a sparse file, if it is missing
  kagami create r0 --force         forget the metadata that is there")]
pub struct CreateArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Make the disk, a sparse file of this size, if it is missing.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,

    /// Replace Kagami metadata that is there already: this copy then counts as unknown.
    #[arg(long)]
    pub force: bool,
}

/// Runs the verb.
pub fn run(place: &Place, args: &CreateArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let side = context.side(mirror);
    let layout = create(&context.config, mirror, side, args)?;
    let room = match &side.metadata {
        Metadata::Internal => format!(
            "its metadata takes the tail, from byte {}: a file system on it must be no larger",
            layout.data_size
        ),
        Metadata::External(path) => format!("its metadata is in {}", path.display()),
    };
    output::line(format!(
        "{}: {} is a new replica with {} ({} bytes) for data; {room}",
        mirror.name,
        side.disk.display(),
        human::size(layout.data_size),
        layout.data_size
    ));
    output::line(format!(
        "next: the same on the other node, then `kagami primary {} --initial` on the one whose \
         data is to be kept",
        mirror.name
    ));
    Ok(())
}

/// Makes `side`'s disk a replica and says how it is laid out.
pub fn create(
    config: &Config,
    mirror: &Mirror,
    side: &Side,
    args: &CreateArgs,
) -> Result<Layout, Refusal> {
    let data = open_data(&side.disk, args.size)?;
    let layout = Layout::new(data.size, metadata_place(side)).map_err(|error| {
        let disk = side.disk.display();
        let remedy = match error {
            LayoutError::TooSmall(_) => "use a larger disk",
            LayoutError::TooLarge(_) => "use a smaller disk",
        };
        let id = match error {
            LayoutError::TooSmall(_) => ErrorId::StoreTooSmall,
            LayoutError::TooLarge(_) => ErrorId::StoreUnsupported,
        };
        Refusal::new(id, format!("{disk}: {error}; {remedy}"))
    })?;
    let external = match &side.metadata {
        Metadata::Internal => None,
        Metadata::External(path) => Some(open_external(path, layout.external_size())?),
    };
    let store = external.as_ref().unwrap_or(&data);
    if !args.force {
        refuse_existing(store, &layout, &mirror.name)?;
    }
    let new = NewReplica {
        replica: random_id()?,
        cluster: config.cluster.clone(),
        mirror: mirror.name.clone(),
        node: side.node.clone(),
    };
    write_image(store, &layout, &new)?;
    Ok(layout)
}

fn open_data(path: &Path, size: Option<u64>) -> Result<Store, Refusal> {
    match size {
        Some(size) if !path.exists() => Store::create(path, size),
        Some(size) => {
            let store = Store::open(path, Access::Write)?;
            if store.size == size {
                return Ok(store);
            }
            Err(Refusal::new(
                ErrorId::UsageConflict,
                format!(
                    "{} exists with {} bytes, not {size}; leave --size away to use it as it is",
                    path.display(),
                    store.size
                ),
            ))
        }
        None => Store::open(path, Access::Write).map_err(|mut refusal| {
            if !path.exists() {
                refusal.message += ", or pass --size to make a sparse file";
            }
            refusal
        }),
    }
}

fn open_external(path: &Path, needed: u64) -> Result<Store, Refusal> {
    if !path.exists() {
        return Store::create(path, needed);
    }
    let store = Store::open(path, Access::Write)?;
    if store.size >= needed {
        return Ok(store);
    }
    Err(Refusal::new(
        ErrorId::StoreTooSmall,
        format!(
            "{} has {} bytes, the metadata needs {needed}; use a larger one, or remove the file",
            path.display(),
            store.size
        ),
    ))
}

/// Anything that was a superblock, even a damaged one, is somebody's history.
fn refuse_existing(store: &Store, layout: &Layout, mirror: &str) -> Result<(), Refusal> {
    for slot in 0..SLOTS {
        let bytes = store.read(layout.slot_offset(slot), META_BLOCK as usize)?;
        let found = match Superblock::parse(&bytes) {
            Err(SlotError::Absent) => continue,
            Ok(parsed) => {
                let old = parsed.untrusted();
                format!("of mirror `{}` on node `{}`", old.mirror_name, old.node)
            }
            Err(error) => format!("that does not verify ({error})"),
        };
        return Err(Refusal::new(
            ErrorId::MetadataPresent,
            format!(
                "there is Kagami metadata {found}; look at it with `kagami dump-metadata \
                 {mirror}`, or pass --force to forget it"
            ),
        ));
    }
    Ok(())
}

/// The slots are erased before anything else and written after everything else, each durably, so
/// that a crash in between leaves no replica rather than half a one.
fn write_image(store: &Store, layout: &Layout, new: &NewReplica) -> Result<(), Refusal> {
    let slots: Vec<u64> = (0..SLOTS).map(|slot| layout.slot_offset(slot)).collect();
    let mut in_slots = false;
    for (offset, bytes) in meta::create(layout, new) {
        if slots.contains(&offset) != in_slots {
            store.sync()?;
            in_slots = !in_slots;
        }
        store.write(offset, &bytes)?;
    }
    store.sync()
}

fn random_id() -> Result<ReplicaId, Refusal> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Refusal::new(
            ErrorId::Internal,
            format!("no random numbers from the kernel: {error}"),
        )
    })?;
    Ok(ReplicaId(u128::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump;
    use std::fs;
    use tempfile::TempDir;

    fn config(dir: &Path, metadata: &str) -> Config {
        let dir = dir.display();
        let text = format!(
            r#"
[cluster]
name = "c"
insecure = true
[[node]]
name = "a"
addresses = ["127.0.0.1"]
[[node]]
name = "b"
addresses = ["127.0.0.2"]
[[mirror]]
name = "r0"
port = 7790
disk = {{ a = "{dir}/a.img", b = "{dir}/b.img" }}
metadata = "{metadata}"
"#
        );
        Config::parse(&text, Path::new("k")).unwrap()
    }

    fn args(size: Option<u64>, force: bool) -> CreateArgs {
        CreateArgs {
            mirror: None,
            size,
            force,
        }
    }

    fn create_a(config: &Config, args: &CreateArgs) -> Result<Layout, Refusal> {
        let mirror = &config.mirrors[0];
        create(config, mirror, &mirror.sides[0], args)
    }

    #[test]
    fn internal_metadata_takes_the_tail_only() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let disk = dir.path().join("a.img");
        fs::write(&disk, vec![0x5a; 8 << 20]).unwrap();
        let layout = create_a(&config, &args(None, false)).unwrap();
        let after = fs::read(&disk).unwrap();
        assert_eq!(after.len(), 8 << 20);
        assert!(
            after[..layout.data_size as usize]
                .iter()
                .all(|&byte| byte == 0x5a)
        );

        let refusal = create_a(&config, &args(None, false)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::MetadataPresent);
        assert!(
            refusal.message.contains("mirror `r0` on node `a`"),
            "{refusal}"
        );
        let first = dump::describe(&config.mirrors[0].sides[0]).unwrap();
        create_a(&config, &args(None, true)).unwrap();
        let second = dump::describe(&config.mirrors[0].sides[0]).unwrap();
        assert_ne!(first.replica, second.replica);
    }

    #[test]
    fn a_missing_disk_is_made_only_on_demand() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let refusal = create_a(&config, &args(None, false)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreUnavailable);
        assert!(refusal.message.contains("--size"), "{refusal}");
        create_a(&config, &args(Some(16 << 20), false)).unwrap();
        assert_eq!(
            fs::metadata(dir.path().join("a.img")).unwrap().len(),
            16 << 20
        );
        let refusal = create_a(&config, &args(Some(8 << 20), true)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::UsageConflict);
    }

    #[test]
    fn external_metadata_is_made() {
        let dir = TempDir::new().unwrap();
        let meta = dir.path().join("meta");
        let config = config(dir.path(), meta.to_str().unwrap());
        let layout = create_a(&config, &args(Some(16 << 20), false)).unwrap();
        assert_eq!(layout.data_size, 16 << 20);
        assert_eq!(fs::metadata(&meta).unwrap().len(), layout.external_size());
        assert_eq!(
            create_a(&config, &args(None, false)).unwrap_err().id,
            ErrorId::MetadataPresent
        );
        fs::write(&meta, b"short").unwrap();
        assert_eq!(
            create_a(&config, &args(None, true)).unwrap_err().id,
            ErrorId::StoreTooSmall
        );
    }

    #[test]
    fn too_small_a_disk() {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), "internal");
        let refusal = create_a(&config, &args(Some(4096), false)).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreTooSmall);
    }
}
