import diffusers
import pytest
import torch
from closed_form import Gaussian, edm_network, vp_network

from cm_diffusers.training.teacher import FACTORS, Teacher, check_teacher, load_teacher, measure_teacher

PROBLEM = Gaussian(mean=0.1, std=0.5)
IMAGES = PROBLEM.draw((512, 1, 4, 4), torch.Generator().manual_seed(7))


def vp_teacher(trained_with: dict, read_as: dict | None = None) -> Teacher:
    """A perfect network for one scheduler's config, read by another's."""
    trained = diffusers.DDPMScheduler(**trained_with)
    network = vp_network(PROBLEM.denoise, trained.alphas_cumprod, trained.config.prediction_type)
    return Teacher(network, diffusers.DDPMScheduler(**(trained_with if read_as is None else read_as)), "a teacher")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_teacher_that_is_read_correctly_passes(prediction_type, beta_schedule):
    teacher = vp_teacher({"prediction_type": prediction_type, "beta_schedule": beta_schedule})
    report = check_teacher(teacher, IMAGES)
    told_another_time = [measure_teacher(teacher.denoiser, IMAGES, factor) for factor in FACTORS]
    assert all(other.typical_error > report.typical_error for other in told_another_time)
    # An ideal denoiser of white Gaussian data is the linear one.
    assert report.errors == pytest.approx(report.bounds, rel=0.1)


@pytest.mark.parametrize("trained", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("read", ["epsilon", "v_prediction", "sample"])
def test_a_wrong_prediction_type_is_named_with_the_right_one(trained, read):
    if trained == read:
        return
    teacher = vp_teacher({"prediction_type": trained}, {"prediction_type": read})
    with pytest.raises(ValueError, match=f"teacher_prediction_type='{trained}'"):
        check_teacher(teacher, IMAGES)


@pytest.mark.parametrize(
    ("trained", "read"),
    [("linear", "squaredcos_cap_v2"), ("squaredcos_cap_v2", "linear"), ("scaled_linear", "linear")],
)
def test_a_wrong_beta_schedule_is_found(trained, read):
    with pytest.raises(ValueError, match="noise schedule|denoise"):
        check_teacher(vp_teacher({"beta_schedule": trained}, {"beta_schedule": read}), IMAGES)


def test_an_untrained_network_is_refused(make_unet):
    teacher = Teacher(make_unet(in_channels=1, out_channels=1), diffusers.DDPMScheduler(), "noise")
    with pytest.raises(ValueError, match="No other prediction type fits"):
        check_teacher(teacher, torch.rand(32, 1, 8, 8) * 2 - 1)


def test_a_network_that_gives_nan_is_refused():
    teacher = vp_teacher({})
    teacher.unet.predict = lambda sample, time: sample * float("nan")
    with pytest.raises(ValueError, match="does not denoise"):
        check_teacher(teacher, IMAGES)


def test_edm_sign_is_found():
    right = Teacher(edm_network(PROBLEM.denoise), diffusers.EDMEulerScheduler(), "edm")
    check_teacher(right, IMAGES)
    wrong = Teacher(right.unet, diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "edm")
    with pytest.raises(ValueError, match="does not denoise"):
        check_teacher(wrong, IMAGES)


def test_the_check_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    measure_teacher(vp_teacher({}).denoiser, IMAGES[:8])
    assert torch.equal(state, torch.get_rng_state())


class TestLoading:
    def test_from_a_folder_a_pipeline_and_a_pair(self, make_unet, tmp_path):
        unet, scheduler = make_unet(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipeline = diffusers.DDPMPipeline(unet, scheduler)
        pipeline.save_pretrained(tmp_path)
        for source in (str(tmp_path), tmp_path, pipeline, (unet, scheduler), [unet, scheduler]):
            teacher = load_teacher(source)
            assert teacher.scheduler.config.beta_schedule == "squaredcos_cap_v2"
            assert not teacher.unet.training
            assert not any(p.requires_grad for p in teacher.unet.parameters())
            assert torch.equal(teacher.unet.conv_in.weight, unet.conv_in.weight)

    def test_prediction_type_can_be_corrected(self, unet):
        teacher = load_teacher((unet, diffusers.DDPMScheduler()), prediction_type="v_prediction")
        assert teacher.preconditioning.prediction_type == "v_prediction"

    @pytest.mark.parametrize("kind", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.ScoreSdeVeScheduler])
    def test_prediction_type_is_refused_where_there_is_one(self, unet, kind):
        with pytest.raises(ValueError, match="one prediction type"):
            load_teacher((unet, kind()), prediction_type="epsilon")

    def test_a_network_that_is_passed_stays_as_it_is(self, make_unet):
        unet = make_unet().train()
        teacher = load_teacher((unet, diffusers.DDPMScheduler()))
        shared = zip(unet.state_dict().values(), teacher.unet.state_dict().values(), strict=True)
        assert all(own.data_ptr() == its.data_ptr() for own, its in shared)
        teacher.unet.to(torch.float16, memory_format=torch.channels_last).compile()
        assert all(module.training for module in unet.modules()) and unet._compiled_call_impl is None
        assert all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in unet.parameters())

    def test_networks_of_other_kinds_are_refused(self, unet):
        class Wrapper(torch.nn.Module):
            config = unet.config

        for network in (Wrapper(), torch.nn.DataParallel(unet), torch.nn.Linear(1, 1)):
            with pytest.raises(TypeError, match="must be a UNet of diffusers"):
                load_teacher((network, diffusers.DDPMScheduler()))

    @pytest.mark.parametrize(
        ("config", "named"),
        [
            ({"in_channels": 3, "out_channels": 4}, "maps 3 channels to 4"),
            ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "learned"),
            ({"class_embed_type": "timestep"}, "num_class_embeds"),
            ({"class_embed_type": "identity"}, "num_class_embeds"),
        ],
    )
    def test_networks_that_take_or_give_what_no_image_is_made_of_are_refused(self, make_unet, config, named):
        with pytest.raises(ValueError, match=named):
            load_teacher((make_unet(**config), diffusers.DDPMScheduler()))

    def test_networks_whose_class_nobody_knows_are_told(self, caplog):
        class Own(diffusers.UNet2DModel):
            pass

        small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        load_teacher((Own(sample_size=8, norm_num_groups=4, **small), diffusers.DDPMScheduler()))
        assert "Own is no class of diffusers" in caplog.text

    def test_pipelines_of_latents_without_text_are_refused(self, make_unet):
        vae = diffusers.VQModel(
            block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=4, latent_channels=3, num_vq_embeddings=4,
        )  # fmt: skip
        pipeline = diffusers.LDMPipeline(vae, make_unet(), diffusers.DDIMScheduler())
        with pytest.raises(ValueError, match="makes latents"):
            load_teacher(pipeline)

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="absent"):
            load_teacher(str(tmp_path / "absent"))

    def test_torn_weights_are_an_error(self, unet, tmp_path):
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_teacher(str(tmp_path))

    def test_unknown_scheduler_is_named(self, unet):
        with pytest.raises(ValueError, match="RePaintScheduler"):
            load_teacher((unet, diffusers.RePaintScheduler()))

    @pytest.mark.parametrize("source", [42, (1, 2, 3), object()])
    def test_other_things_are_refused(self, source):
        with pytest.raises(TypeError):
            load_teacher(source)

    def test_text_conditional_networks_are_refused(self):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
            cross_attention_dim=8, mid_block_type=None,
        )  # fmt: skip
        with pytest.raises(TypeError, match="text"):
            load_teacher((unet, diffusers.DDPMScheduler()))
