"""Functions of a known form that answer with what no loss may be."""

import torch


def on_another_device(pi_w, pi_l, ref_w, ref_l, beta):
    return (pi_w - pi_l).to("meta")


def generator_out(pi_w, pi_l, ref_w, ref_l, beta):
    return (value for value in pi_w)


def none_out(pi_w, pi_l, ref_w, ref_l, beta):
    print("no return")


def wrong_shape(pi_w, pi_l, ref_w, ref_l, beta):
    return torch.cat([pi_w, pi_l, ref_w])


def column_shape(pi_w, pi_l, ref_w, ref_l, beta):
    return (pi_w - pi_l)[:, None]


def not_a_number(pi_w, pi_l, ref_w, ref_l, beta):
    return torch.log(pi_w - pi_l - 1e6)


def detached_numpy(pi_w, pi_l, ref_w, ref_l, beta):
    return (pi_w - pi_l).detach().numpy()


def get_logps(logits, labels):
    return logits


def get_logps_on_meta(model, input_ids, attention_mask, response_mask):
    return input_ids.sum(1).double().to("meta")


def text_out(pi_w, pi_l, ref_w, ref_l, beta):
    return "0.69"
