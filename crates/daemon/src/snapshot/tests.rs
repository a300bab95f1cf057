use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use berth_api::vmm::SUSPENDED;
use berth_disk::chain::{Access, open_image};
use berth_disk::format::Format;
use berth_disk::tools;

use super::*;
use crate::folder::VmToml;

const JOURNAL: &str = "state/restore.toml";

/// A machine with two disks, and a snapshot of them, in which each begins with 1; they begin with 2 now.
struct Case {
    _dir: tempfile::TempDir,
    folder: Folder,
    toml: SnapshotToml,
}

fn disk(number: usize) -> PathBuf {
    format!("disk{number}.qcow2").into()
}

fn write(folder: &Folder, number: usize, byte: u8) {
    let image = open_image(&folder.file(disk(number)), Access::Write).unwrap();
    image.write(0, &[byte]).unwrap();
}

fn read(folder: &Folder, number: usize) -> u8 {
    let image = open_image(&folder.file(disk(number)), Access::Read).unwrap();
    let mut byte = [0];
    image.read(0, &mut byte).unwrap();
    byte[0]
}

fn state(folder: &Folder, directory: &Path, byte: u8) -> StateSums {
    let path = folder.file(directory);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("machine.json"), [byte]).unwrap();
    let memory = fs::File::create(path.join("memory")).unwrap();
    memory.set_len(4 << 20).unwrap();
    memory.write_all_at(&[byte], 2 << 20).unwrap();
    sums::of(&path).unwrap()
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks = [0, 1].map(|number| Disk {
            file: disk(number),
            format: DiskFormat::Qcow2,
            read_only: false,
        });
        let machine = MachineConfig { disks: disks.into(), ..MachineConfig::default() };
        let config = VmToml {
            version: folder::VERSION,
            id: Uuid::new_v4(),
            created: Timestamp::now(),
            machine,
        };
        let folder = Folder::create(dir.path(), "a", &config, |folder| {
            for number in [0, 1] {
                let path = folder.file(disk(number));
                tools::create(&path, Format::Qcow2, Some(1 << 20), None).unwrap();
                write(folder, number, 1);
            }
            Ok::<_, FolderError>(())
        })
        .unwrap();
        let toml = take(&folder, "one", true);
        write(&folder, 0, 2);
        write(&folder, 1, 2);
        let mut other = config;
        other.machine.cpus = 2;
        folder.write_config(&other).unwrap();
        state(&folder, Path::new(SUSPENDED), 9);
        Self { _dir: dir, folder, toml }
    }

    fn is_as_before(&self) -> bool {
        let disks = [read(&self.folder, 0), read(&self.folder, 1)];
        let cpus = self.folder.config().unwrap().machine.cpus;
        let state = fs::read(self.folder.file(SUSPENDED).join("machine.json")).unwrap();
        let is_before = match (disks, cpus, &*state) {
            ([2, 2], 2, [9]) => true,
            ([1, 1], 1, [1]) => false,
            other => panic!("half of each: {other:?}"),
        };
        let names = fs::read_dir(self.folder.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.starts_with("next-")).collect();
        assert_eq!(left, [""; 0]);
        assert!(!self.folder.file("state/.restoring").exists());
        assert!(!self.folder.file(JOURNAL).exists());
        is_before
    }

    fn settle(&self) {
        let lock = self.folder.lock().unwrap();
        settle(&self.folder, &lock).unwrap();
    }
}

fn take(folder: &Folder, tag: &str, with_state: bool) -> SnapshotToml {
    let machine = folder.config().unwrap().machine;
    let layers = new_layers(&machine).unwrap();
    let draft = Draft::begin(folder, false).unwrap();
    let mut frozen = Vec::new();
    for (number, layer) in layers.into_iter().enumerate() {
        let layer = layer.unwrap();
        berth_disk::layers::freeze(&folder.file(disk(number)), &layer).unwrap();
        frozen.push(FrozenDisk { disk: number, file: layer });
    }
    let toml = SnapshotToml {
        version: VERSION,
        id: Uuid::new_v4(),
        tag: tag.into(),
        created: Timestamp::now(),
        ancestors: ancestors(folder).unwrap(),
        pause_us: None,
        machine,
        layers: frozen,
        state: with_state.then(|| state(folder, Path::new(&draft.state_name()), 1)),
    };
    draft.publish(&toml).unwrap();
    toml
}

fn layer_count(folder: &Folder) -> usize {
    let entries = fs::read_dir(folder.path()).unwrap();
    entries.filter(|e| is_layer_name(&e.as_ref().unwrap().file_name().to_string_lossy())).count()
}

#[test]
fn what_is_written_is_read() {
    let case = Case::new();
    assert_eq!(find(&case.folder, "one").unwrap(), case.toml);
    assert_eq!(ancestors(&case.folder).unwrap(), [case.toml.id]);
    assert!(matches!(find(&case.folder, "two"), Err(SnapshotError::Absent { .. })));
    assert!(matches!(find(&case.folder, ".."), Err(SnapshotError::Absent { .. })));
    let sums = case.toml.state.as_ref().unwrap();
    sums.verify(&state_of(&case.folder, "one")).unwrap();
    // A second of that name leaves nothing but layers that nobody needs.
    let draft = Draft::begin(&case.folder, true).unwrap();
    let error = draft.publish(&case.toml).unwrap_err();
    assert!(matches!(error, SnapshotError::Folder(FolderError::Exists { .. })), "{error}");
    assert_eq!(all(&case.folder).unwrap().len(), 1);
    assert_eq!(fs::read_dir(case.folder.file(DIRECTORY)).unwrap().count(), 2);
}

#[test]
fn a_restore_that_is_cut_at_any_step_is_done_or_not_begun() {
    // What was made before the journal is swept away.
    let case = Case::new();
    restore::prepare(&case.folder, &case.toml).unwrap();
    case.settle();
    assert!(case.is_as_before());

    // From the journal on, whatever was done of the rest, it is ended.
    for steps in 0..=7 {
        let case = Case::new();
        let folder = &case.folder;
        let journal = restore::prepare(folder, &case.toml).unwrap();
        write_toml(&folder.file(JOURNAL), &journal).unwrap();
        for step in 0..steps {
            match step {
                0 | 1 => {
                    let disk = &journal.disks[step];
                    fs::rename(folder.file(&disk.from), folder.file(&disk.file)).unwrap();
                }
                // A removal that came half way.
                2 => fs::remove_file(folder.file(SUSPENDED).join("memory")).unwrap(),
                3 => fs::remove_dir_all(folder.file(SUSPENDED)).unwrap(),
                4 => {
                    fs::rename(folder.file("state/.restoring"), folder.file(SUSPENDED)).unwrap();
                }
                5 => {
                    let mut config = folder.config().unwrap();
                    config.machine = journal.machine.clone();
                    folder.write_config(&config).unwrap();
                }
                _ => set_ancestors(folder, journal.ancestors.clone()).unwrap(),
            }
        }
        case.settle();
        assert!(!case.is_as_before(), "{steps} steps");
        case.settle();
        // What it was made of is as it was.
        let sums = case.toml.state.as_ref().unwrap();
        sums.verify(&state_of(folder, "one")).unwrap();
        assert_eq!(ancestors(folder).unwrap(), [case.toml.id]);
    }
    let case = Case::new();
    let lock = case.folder.lock().unwrap();
    restore::restore(&case.folder, &case.toml, &lock).unwrap();
    assert!(!case.is_as_before());
}

#[test]
fn a_journal_that_was_altered_stops_everything() {
    let case = Case::new();
    let mut journal = restore::prepare(&case.folder, &case.toml).unwrap();
    journal.disks[0].from = "../../etc/passwd".into();
    write_toml(&case.folder.file(JOURNAL), &journal).unwrap();
    let lock = case.folder.lock().unwrap();
    let error = settle(&case.folder, &lock).unwrap_err().to_string();
    assert!(error.contains("passwd"), "{error}");
    fs::write(case.folder.file(JOURNAL), "rubbish").unwrap();
    assert!(settle(&case.folder, &lock).is_err());
}

#[test]
fn layers_stay_as_long_as_somebody_needs_them() {
    let case = Case::new();
    let folder = &case.folder;
    assert_eq!(layer_count(folder), 2);
    let two = take(folder, "two", false);
    assert_eq!(two.ancestors, [case.toml.id]);
    let lock = folder.lock().unwrap();
    restore::restore(folder, &case.toml, &lock).unwrap();
    assert_eq!(layer_count(folder), 4);
    // Layers that a crash left, and files that only look like them.
    let orphan = layer_name(&Uuid::new_v4().to_string());
    for name in [&*orphan, "layer-mine.qcow2"] {
        tools::create(&folder.file(name), Format::Qcow2, Some(512), None).unwrap();
    }
    settle(folder, &lock).unwrap();
    assert!(!folder.file(&orphan).exists());
    assert!(folder.file("layer-mine.qcow2").exists());
    remove(folder, "two").unwrap();
    assert_eq!(layer_count(folder), 2, "what only it needed goes with it");
    assert!(matches!(remove(folder, "two"), Err(SnapshotError::Absent { .. })));
    remove(folder, "one").unwrap();
    assert_eq!(layer_count(folder), 2, "the machine's own disks are on them");
    assert_eq!([read(folder, 0), read(folder, 1)], [1, 1]);
    // As long as one cannot be understood, nothing is removed.
    let three = take(folder, "three", false);
    let path = folder.file(DIRECTORY).join("three").join(DESCRIPTION);
    fs::write(&path, "rubbish").unwrap();
    write(folder, 0, 3);
    tools::create(&folder.file(&orphan), Format::Qcow2, Some(512), None).unwrap();
    settle(folder, &lock).unwrap();
    assert!(folder.file(&orphan).exists());
    assert_eq!(layer_count(folder), 2 + three.layers.len() + 1);
}
